"""Device identity, on this machine and on made-up ones."""

from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest

from lpvit_profilers import machine
from lpvit_profilers.device import (
    DeviceIdentity,
    differences,
    fingerprint,
    identify,
)
from lpvit_profilers.tegra import PowerMode, jetpack_version, power_mode

SYSFS = Path(__file__).parent / "fixtures" / "sysfs"


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


def no_command(arguments: Sequence[str]) -> str | None:
    raise AssertionError(f"{arguments} must not run here")


def orin(root: Path) -> Path:
    """A made-up Orin Nano: every file that identify() reads without root rights."""
    policy = "sys/devices/system/cpu/cpufreq/policy0"
    gpu = "sys/class/devfreq/17000000.gpu"
    return tree(
        root,
        {
            "proc/device-tree/model": "NVIDIA Jetson Orin Nano\0",
            "proc/device-tree/compatible": "nvidia,p3767-0003\0nvidia,tegra234\0",
            "etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 1, BOARD: generic\n",
            "etc/os-release": 'NAME="Ubuntu"\nPRETTY_NAME="Ubuntu 22.04.5 LTS"\n',
            "proc/sys/kernel/osrelease": "5.15.148-tegra\n",
            "proc/cpuinfo": "processor\t: 0\nFeatures\t: fp asimd asimddp asimdhp\n"
            "CPU implementer\t: 0x41\nCPU part\t: 0xd42\n",
            "proc/meminfo": "MemTotal:        7802880 kB\nMemFree: 1 kB\n",
            "proc/self/status": "Name:\tx\nCpus_allowed_list:\t0-5\n",
            "sys/devices/system/cpu/online": "0-5\n",
            f"{policy}/affected_cpus": "0 1 2 3",
            f"{policy}/scaling_governor": "schedutil",
            f"{policy}/scaling_min_freq": "729600",
            f"{policy}/scaling_max_freq": "1510400",
            f"{policy}/scaling_cur_freq": "729600",
            f"{gpu}/governor": "nvhost_podgov",
            f"{gpu}/min_freq": "306000000",
            f"{gpu}/max_freq": "624750000",
            f"{gpu}/cur_freq": "306000000",
            "sys/class/hwmon/hwmon2/name": "pwmfan",
            "sys/class/hwmon/hwmon2/pwm1": "62",
            "sys/class/thermal/thermal_zone0/type": "cpu-thermal",
            "sys/class/thermal/thermal_zone0/temp": "49500",
            "sys/class/thermal/thermal_zone1/type": "cv0-thermal",
            "sys/class/thermal/thermal_zone1/temp": "",
            "sys/class/thermal/thermal_zone2/type": "PMIC-Die",
            "sys/class/thermal/thermal_zone2/temp": "100000",
            "usr/local/cuda/version.json": '{"cuda" : {"name" : "CUDA", "version" : "12.6.68"}}',
            "var/lib/dpkg/status": "Package: libnvinfer10\nStatus: install ok installed\n"
            "Version: 10.3.0.30-1+cuda12.5\n\nPackage: zlib1g\nVersion: 1\n",
        },
    )


def nvpmodel(arguments: Sequence[str]) -> str | None:
    assert tuple(arguments) == ("nvpmodel", "-q")
    return "NVPM WARN: fan mode is not set!\nNV Power Mode: 15W\n0\n"


def test_a_jetson_is_read_without_root(tmp_path: Path) -> None:
    found = identify(root=orin(tmp_path), command=nvpmodel)
    assert found.board_model == "NVIDIA Jetson Orin Nano"
    assert (found.soc, found.l4t, found.jetpack) == ("tegra234", "36.4.3", "6.2")
    assert (found.os, found.kernel) == ("Ubuntu 22.04.5 LTS", "5.15.148-tegra")
    assert (found.cpu_model, found.cpu_isa) == ("Cortex-A78AE", ("asimd", "dotprod", "fp16"))
    assert (found.logical_cores, found.cpus_allowed, found.memory_mb) == (6, "0-5", 7620)
    assert found.power_mode == PowerMode(id=0, name="15W")
    assert [(c.governor, c.max_mhz) for c in found.cpu_clocks] == [("schedutil", 1510.4)]
    assert [(c.name, c.max_mhz) for c in found.gpu_clocks] == [("17000000.gpu", 624.75)]
    assert found.fans_pwm == {"pwmfan": 62}
    assert found.temperatures_c == {"cpu": 49.5}
    assert found.cuda == "12.6.68"
    assert found.emc_mhz is None


def test_tensorrt_of_jetpack_is_found_among_the_debian_packages(tmp_path: Path) -> None:
    found = identify(root=orin(tmp_path), command=nvpmodel)
    assert found.runtimes["tensorrt"] == "10.3.0.30"


@pytest.mark.parametrize(
    ("board", "expected_mv"),
    [("orin_nano", 4984), ("agx_orin", 20000), ("agx_thor", 20000), ("nano_legacy", 5000)],
)
def test_the_supply_voltage_comes_from_the_input_rail(board: str, expected_mv: int) -> None:
    assert identify(root=SYSFS / board, command=nvpmodel).supply_mv == expected_mv


def test_an_empty_machine_is_unknown_and_never_zero(tmp_path: Path) -> None:
    found = identify(root=tmp_path, command=no_command)
    kept = {"machine", "runtimes", "euid"}
    for name, value in msgspec.structs.asdict(found).items():
        assert name in kept or value is None or value in ((), {}), name


def test_this_machine_has_a_processor_a_kernel_and_memory() -> None:
    found = identify()
    assert found.cpu_model
    assert found.kernel
    assert found.memory_mb is not None
    assert found.memory_mb > 100
    assert found.runtimes["numpy"]


@pytest.mark.parametrize("field", ["flags", "Features"])
def test_instruction_sets_keep_their_own_names(tmp_path: Path, field: str) -> None:
    text = f"{field}\t\t: fpu avx2 fma avx512f avx512_bf16 avx512_vnni amx_int8 sve i8mm\n"
    root = tree(tmp_path, {"proc/cpuinfo": text})
    assert machine.cpu_isa(root) == (
        "amx_int8", "avx2", "avx512_bf16", "avx512_vnni", "avx512f", "fma", "i8mm", "sve",
    )  # fmt: skip


def test_an_unknown_arm_core_shows_its_numbers(tmp_path: Path) -> None:
    root = tree(tmp_path, {"proc/cpuinfo": "CPU implementer\t: 0x41\nCPU part\t: 0xfff\n"})
    assert machine.cpu_model(root) == "ARM implementer 0x41 part 0xfff"


@pytest.mark.parametrize(
    ("text", "expected"),
    [("0", 1), ("0-3", 4), ("0-3,6,8-9", 7), ("", None), (None, None), ("0-", None), ("x", None)],
)
def test_lists_of_cores_are_counted(text: str | None, expected: int | None) -> None:
    assert machine.count_cpu_list(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"), [("150000 100000", 1.5), ("max 100000", None), ("", None), ("1 0", None)]
)
def test_a_containers_limit_counts_in_cores(
    tmp_path: Path, text: str, expected: float | None
) -> None:
    assert machine.cpu_quota(tree(tmp_path, {"sys/fs/cgroup/cpu.max": text})) == expected


@pytest.mark.parametrize("text", [None, "", "nvpmodel: command failed", "NV Power Mode: MAXN"])
def test_an_nvpmodel_that_does_not_answer_is_unknown(text: str | None) -> None:
    assert power_mode(lambda _: text) is None


def test_an_unknown_l4t_has_no_jetpack() -> None:
    assert jetpack_version("99.1.0") is None


def test_what_only_drifts_does_not_change_the_fingerprint(tmp_path: Path) -> None:
    cool = identify(root=orin(tmp_path), command=nvpmodel)
    warm = msgspec.structs.replace(
        cool, temperatures_c={"cpu": 80.0}, fans_pwm={}, supply_mv=4900, emc_mhz=2133.0, euid=0
    )
    assert fingerprint(warm) == fingerprint(cool)
    assert differences(cool, warm) == ()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            {"power_mode": PowerMode(id=2, name="MAXN")},
            "power mode: 15W (id 0) against MAXN (id 2)",
        ),
        ({"power_mode": None}, "power mode: 15W (id 0) against unknown"),
        ({"cpus_allowed": "0-1"}, "number of cores this process may use: 6 against 2"),
        ({"runtimes": {}}, "TensorRT: 10.3.0.30 against unknown"),
        ({"cpu_model": "x"}, "CPU: Cortex-A78AE against x"),
    ],
)
def test_differences_name_what_makes_two_profiles_incomparable(
    tmp_path: Path, change: dict[str, object], expected: str
) -> None:
    ours = identify(root=orin(tmp_path), command=nvpmodel)
    theirs = msgspec.structs.replace(ours, **change)
    assert expected in differences(ours, theirs)
    assert fingerprint(ours) != fingerprint(theirs)


def test_a_fingerprint_is_sixteen_hex_digits_and_the_same_every_time(tmp_path: Path) -> None:
    first, second = (identify(root=orin(tmp_path), command=nvpmodel) for _ in range(2))
    assert fingerprint(first) == fingerprint(second)
    assert len(bytes.fromhex(fingerprint(first))) == 8


def test_an_identity_survives_json(tmp_path: Path) -> None:
    ours = identify(root=orin(tmp_path), command=nvpmodel)
    back = msgspec.json.decode(msgspec.json.encode(ours), type=DeviceIdentity)
    assert back == ours
    assert fingerprint(back) == fingerprint(ours)
