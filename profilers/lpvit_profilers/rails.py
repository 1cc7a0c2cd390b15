"""Power rails of a Jetson in sysfs, found by driver and label, never by hwmon number.

    JetPack 5 to 7   /sys/bus/i2c/drivers/ina3221/*/hwmon/hwmon*/in{1,2,3}_label ...
    JetPack 4        /sys/bus/i2c/drivers/ina3221x/*/iio:device*/rail_name_{0,1,2} ...
    Thor's input     /sys/bus/i2c/drivers/ina238/*/hwmon/hwmon*/power1_input

Paths and units: Linux drivers/hwmon/ina3221.c and Documentation/hwmon/ina238.rst; the JetPack 4
tree is NVIDIA's own driver. Channels 4 to 7 of an INA3221 are shunt voltages and their sum.
"""

from collections.abc import Iterator
from pathlib import Path

import msgspec

from lpvit_profilers.sysfs import numbered, read_int, read_text

_DRIVERS = Path("sys/bus/i2c/drivers")
# One step of an INA3221's shunt converter (data sheet; the driver's shunt register is in 40 uV).
_SHUNT_STEP_UV = 40


class Rail(msgspec.Struct, frozen=True, kw_only=True):
    """Where one rail's numbers are. Voltage in mV, current in mA; power in units of
    `power_unit_mw` where the chip gives it, otherwise it is voltage times current."""

    name: str
    sensor: str  # "ina3221@1-0040"
    voltage: Path
    current: Path
    power: Path | None = None
    power_unit_mw: float = 1.0
    shunt_uohm: int | None = None

    def read_voltage_mv(self) -> int | None:
        return read_int(self.voltage)

    def resolution_mw(self) -> float | None:
        """Power of one step of the shunt converter at the present voltage, None if unknown.

        40 uV over 5 mOhm is 8 mA, which is 40 mW at 5 V and 160 mW at 20 V.
        """
        voltage_mv = self.read_voltage_mv()
        if not voltage_mv or not self.shunt_uohm:
            return None
        return voltage_mv * _SHUNT_STEP_UV / self.shunt_uohm


def find_rails(root: Path = Path("/")) -> tuple[Rail, ...]:
    """Every connected rail, in the order of the sensors' bus addresses; () where there is none."""
    drivers = root / _DRIVERS
    return (
        *_hwmon_rails(drivers / "ina3221"),
        *_iio_rails(drivers / "ina3221x"),
        *_input_rails(drivers / "ina238"),
    )


def _hwmon_rails(driver: Path) -> Iterator[Rail]:
    for chip in sorted(driver.glob("*/hwmon/hwmon*")):
        for channel in (1, 2, 3):
            name = read_text(chip / f"in{channel}_label")
            if _is_connected(name) and read_text(chip / f"in{channel}_enable") != "0":
                yield Rail(
                    name=name or "",
                    sensor=f"ina3221@{chip.parent.parent.name}",
                    voltage=chip / f"in{channel}_input",
                    current=chip / f"curr{channel}_input",
                    shunt_uohm=read_int(chip / f"shunt{channel}_resistor"),
                )


def _iio_rails(driver: Path) -> Iterator[Rail]:
    for chip in sorted(driver.glob("*/iio:device*")):
        for channel in (0, 1, 2):
            name = read_text(chip / f"rail_name_{channel}")
            if _is_connected(name):
                yield Rail(
                    name=name or "",
                    sensor=f"ina3221x@{chip.parent.name}",
                    voltage=chip / f"in_voltage{channel}_input",
                    current=chip / f"in_current{channel}_input",
                    power=chip / f"in_power{channel}_input",
                )


def _input_rails(driver: Path) -> Iterator[Rail]:
    """The INA238 of AGX Thor carries no label; it measures VIN, the board's input."""
    for chip in sorted(numbered(driver, "*/hwmon/hwmon*"))[:1]:
        yield Rail(
            name="VIN",
            sensor=f"ina238@{chip.parent.parent.name}",
            voltage=chip / "in1_input",
            current=chip / "curr1_input",
            power=chip / "power1_input",
            power_unit_mw=1e-3,
        )


def _is_connected(label: str | None) -> bool:
    return bool(label) and label != "NC"
