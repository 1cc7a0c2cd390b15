"""Verdicts over OPC UA, against a real asyncua server that goes away and comes back."""

import asyncio
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

pytest.importorskip("asyncua", reason="extra opcua is not installed")
from asyncua import ua as _ua
from asyncua.crypto.cert_gen import setup_self_signed_certificate
from asyncua.crypto.permission_rules import User, UserRole
from asyncua.crypto.uacrypto import load_certificate
from asyncua.sync import Server, ThreadLoop
from cryptography.x509.oid import ExtendedKeyUsageOID

from lpvit_edge.errors import SinkError, UnknownOptionError
from lpvit_edge.line.config import parse_sink
from lpvit_edge.line.journal import Journal
from lpvit_edge.line.sink_config import OpcUaNodes, OpcUaSink
from lpvit_edge.line.sinks.opcua import OpcUa
from lpvit_edge.line.sinks.remote import RemoteSink
from tests.broker import free_port, wait_for
from tests.plant import frame

ua: Any = _ua  # its stubs take no plain numbers and texts
TYPES = {
    "number": ua.VariantType.UInt32, "part": ua.VariantType.String,
    "verdict": ua.VariantType.String, "action": ua.VariantType.Int16,
    "reject": ua.VariantType.Boolean, "label": ua.VariantType.Byte,
    "confidence": ua.VariantType.Float, "age_ms": ua.VariantType.Int32,
    "heartbeat": ua.VariantType.Byte, "state": ua.VariantType.String,
    "judging": ua.VariantType.Boolean, "ok_count": ua.VariantType.UInt32,
    "reject_count": ua.VariantType.UInt64, "missed_count": ua.VariantType.Int16,
}  # fmt: skip
USER, PASSWORD = "line", "se/cr@et"


class Users:
    """Lets one user in, by password, beside the anonymous."""

    def get_user(
        self, iserver: Any, username: Any = None, password: Any = None, certificate: Any = None
    ) -> User | None:
        if username is None or (username, password) == (USER, PASSWORD):
            return User(role=UserRole.User)
        return None


class Plant:
    """A server with a node of each type, on a port that it keeps when it is started again."""

    def __init__(self, certificates: Path) -> None:
        self.port = free_port()
        self._certificates = certificates
        self._loop: ThreadLoop | None = None
        self.start()

    def start(self) -> None:
        self._loop = ThreadLoop(30)
        self._loop.start()
        self._server = Server(tloop=self._loop)
        inner: Any = self._server.aio_obj.iserver
        inner.user_manager = Users()
        self._server.set_endpoint(f"opc.tcp://127.0.0.1:{self.port}/plant")
        self._secure(self._certificates)
        index = self._server.register_namespace("urn:plant")
        folder = self._server.nodes.objects.add_folder(index, "Line3")
        self.nodes = {}
        for field, kind in TYPES.items():
            node_id = ua.NodeId(f"Line3.{field}", index)
            empty: Any = "" if kind is ua.VariantType.String else 0
            if kind is ua.VariantType.Boolean:
                empty = False
            node = folder.add_variable(node_id, field, empty, varianttype=kind)
            node.set_writable()
            self.nodes[field] = node
        folder.add_variable(ua.NodeId("Fixed", index), "Fixed", "")
        folder.add_variable(ua.NodeId("Time", index), "Time", 0, ua.VariantType.DateTime)
        self._server.start()

    def _secure(self, folder: Path) -> None:
        server = self._server.aio_obj
        policies = ua.SecurityPolicyType
        server.set_security_policy([policies.NoSecurity, policies.Basic256Sha256_SignAndEncrypt])
        assert self._loop is not None
        self._loop.post(server.load_certificate(folder / "server.der"))
        self._loop.post(server.load_private_key(folder / "server.pem"))
        trusted = self._loop.post(load_certificate(folder / "line.der"))

        async def validate(certificate: Any, description: Any) -> None:
            if certificate != trusted:
                raise ua.uaerrors.BadCertificateUntrusted

        server.set_certificate_validator(validate)

    def stop(self) -> None:
        if self._loop is not None:
            self._server.stop()
            self._loop.stop()
            self._loop = None

    def value(self, field: str) -> Any:
        return self.nodes[field].read_value()


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("certificates")
    for name, usage in (("server", "SERVER"), ("line", "CLIENT"), ("other", "CLIENT")):
        uri = {"server": "urn:freeopcua:python:server"}.get(name, "urn:lpvit-edge:line")
        asyncio.run(
            setup_self_signed_certificate(
                folder / f"{name}.pem", folder / f"{name}.der", uri, "localhost",
                [getattr(ExtendedKeyUsageOID, f"{usage}_AUTH")], {},
            )
        )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def plant(certificates: Path) -> Iterator[Plant]:
    plant = Plant(certificates)
    yield plant
    plant.stop()


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    journal = Journal(tmp_path / "journal.sqlite")
    yield journal
    journal.close()


def config(port: int, **settings: Any) -> OpcUaSink:
    nodes = OpcUaNodes(**{field: f"ns=2;s=Line3.{field}" for field in TYPES})
    plain = OpcUaSink(target=f"opc.tcp://127.0.0.1:{port}/plant", nodes=nodes, timeout_s=2.0)
    return msgspec.structs.replace(plain, **settings)


def test_a_verdict_is_written_in_the_type_of_each_node(plant: Plant, journal: Journal) -> None:
    sink = RemoteSink(OpcUa(config(plant.port)), journal)
    wait_for(lambda: plant.value("state") == "online", what=sink.error)
    journal.append(frame(70_001, "reject", age_s=0.05, probabilities=(0.1, 0.75, 0.15)))
    wait_for(lambda: plant.value("number") == 70_001, what=sink.error)
    found = {field: plant.value(field) for field in TYPES}
    assert (found["part"], found["verdict"], found["action"]) == ("70001", "reject", 2)
    assert (found["reject"], found["label"], found["confidence"]) == (True, 2, 0.75)
    assert 50 <= found["age_ms"] < 550
    assert (found["ok_count"], found["reject_count"], found["missed_count"]) == (0, 1, 0)
    assert found["judging"] is True
    sink.hold(True)
    wait_for(lambda: plant.value("state") == "held", what=sink.error)
    assert (plant.value("judging"), plant.value("reject")) == (False, False)
    assert sink.close(5.0) == 0
    assert plant.value("state") == "offline"


def test_the_node_does_not_go_on_rejecting_a_part_that_is_gone(
    plant: Plant, journal: Journal
) -> None:
    remote = OpcUa(config(plant.port))
    journal.append(frame(1, "reject"))
    journal.append(frame(2, "reject", age_s=60.0))
    first, late = journal.after(0)
    remote.send([first])
    remote.beat(is_held=False)
    assert plant.value("reject") is True  # a heartbeat leaves it
    remote.send([late])
    assert (plant.value("reject"), plant.value("number")) == (False, 1)
    journal.append(frame(3, "reject"))
    remote.send(journal.after(late.id))
    assert plant.value("reject") is True
    remote._is_sound = False  # as after a request without an answer: nothing more is said
    remote.disconnect()
    assert plant.value("reject") is True
    remote.beat(is_held=False)
    assert plant.value("reject") is False
    remote.disconnect()


def test_a_verdict_that_turns_old_in_its_first_request_gets_no_second(
    plant: Plant, journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = OpcUa(config(plant.port, max_age_ms=1000.0))
    journal.append(frame(61))
    remote.send(journal.after(0))
    assert plant.value("number") == 61
    write = remote._write

    def slow(values: Any) -> None:
        write(values)
        time.sleep(1.1)

    journal.append(frame(62, "reject"))
    with monkeypatch.context() as patched:
        patched.setattr(remote, "_write", slow)
        remote.send(journal.after(1))
    assert plant.value("number") == 61
    assert remote.missed == 1
    remote.disconnect()


def test_the_node_rejects_a_part_once_when_the_request_behind_it_fails(
    plant: Plant, journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = OpcUa(config(plant.port, max_age_ms=60_000.0))
    journal.append(frame(71, "reject"))
    entries = journal.after(0)
    write = remote._write

    def lost(values: Any) -> None:
        if "number" in values:
            raise SinkError("the connection was lost")
        write(values)

    with monkeypatch.context() as patched:
        patched.setattr(remote, "_write", lost)
        with pytest.raises(SinkError):
            remote.send(entries)
    assert plant.value("reject") is True
    remote.disconnect()
    remote.beat(is_held=False)
    remote.send(entries)
    assert (plant.value("reject"), plant.value("number")) == (False, 71)
    assert remote.missed == 1
    remote.disconnect()


def test_the_heartbeat_goes_on_while_no_part_comes_and_fits_a_small_node(
    plant: Plant, journal: Journal
) -> None:
    remote = OpcUa(config(plant.port))
    remote._heart = 254
    sink = RemoteSink(remote, journal)
    beats: set[int] = set()

    def seen() -> bool:
        beats.add(plant.value("heartbeat"))
        return beats >= {255, 0, 1}

    wait_for(seen, what=(beats, sink.error))
    assert sink.close(5.0) == 0


def test_what_was_decided_while_the_server_was_down_is_counted_and_not_told(
    plant: Plant, journal: Journal
) -> None:
    sink = RemoteSink(OpcUa(config(plant.port)), journal)
    journal.append(frame(1))
    wait_for(lambda: plant.value("number") == 1, what=sink.error)
    plant.stop()
    wait_for(lambda: sink.error is not None)
    for number in range(2, 102):
        journal.append(frame(number, "reject"))
    wait_for(lambda: sink.missed == 100, what=sink.missed)  # while it is still down
    plant.start()
    wait_for(lambda: sink.error is None, what=sink.error)
    journal.append(frame(102))
    wait_for(lambda: plant.value("number") == 102, what=sink.error)
    assert (plant.value("reject_count"), plant.value("missed_count")) == (100, 100)
    assert sink.close(5.0) == 0


@pytest.mark.parametrize(
    ("node", "text"),
    [
        ("ns=2;s=Nowhere", r"nodes\.verdict = ns=2;s=Nowhere: .*BadNodeIdUnknown"),
        ("ns=2;s=Fixed", r"nodes\.verdict = ns=2;s=Fixed: .*(BadNotWritable|BadUserAccessDenied)"),
        ("ns=2;s=Time", r"nodes\.verdict = ns=2;s=Time: a node of type DateTime cannot hold that"),
    ],
)
def test_a_node_that_cannot_be_written_is_named(
    plant: Plant, journal: Journal, node: str, text: str
) -> None:
    sink = RemoteSink(OpcUa(config(plant.port, nodes=OpcUaNodes(verdict=node))), journal)
    journal.append(frame(1))
    wait_for(lambda: sink.error is not None)
    error = sink.error
    sink.close(1.0)
    with pytest.raises(SinkError, match=text):
        raise SinkError(error)


def test_a_server_that_is_not_there_is_told_in_words() -> None:
    remote = OpcUa(config(free_port()))
    with pytest.raises(SinkError, match=r"opcua opc.tcp://127.0.0.1:\d+/plant: .*refused"):
        remote.beat(is_held=False)
    remote.disconnect()


def secure_config(port: int, folder: Path, **settings: Any) -> OpcUaSink:
    return config(
        port,
        target=f"opc.tcp://{USER}:${{PLANT_PASSWORD}}@127.0.0.1:{port}/plant",
        security="Basic256Sha256", certificate=str(folder / "line.der"),
        key=str(folder / "line.pem"), server_certificate=str(folder / "server.der"), **settings,
    )  # fmt: skip


def test_an_encrypted_session_with_a_password_writes_and_no_log_holds_the_password(
    plant: Plant,
    certificates: Path,
    journal: Journal,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("PLANT_PASSWORD", PASSWORD)
    caplog.set_level(logging.DEBUG)
    sink = RemoteSink(OpcUa(secure_config(plant.port, certificates)), journal)
    journal.append(frame(7))
    wait_for(lambda: plant.value("number") == 7, what=sink.error)
    assert sink.close(5.0) == 0
    assert [r.message for r in caplog.records if PASSWORD in r.getMessage()] == []
    assert PASSWORD not in sink.name
    assert sink.name == f"opcua opc.tcp://***@127.0.0.1:{plant.port}/plant"


def test_a_wrong_password_is_refused_in_words_without_it(
    plant: Plant, certificates: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PLANT_PASSWORD", "guessed-secret")
    remote = OpcUa(secure_config(plant.port, certificates))
    with pytest.raises(SinkError, match=r"BadUserAccessDenied|BadIdentityTokenRejected") as caught:
        remote.beat(is_held=False)
    remote.disconnect()
    assert "guessed" not in str(caught.value)


@pytest.mark.parametrize(
    ("other", "text"),
    [
        ({"certificate": "other.der", "key": "other.pem"}, "not trusted.*BadCertificateUntrusted"),
        ({"server_certificate": "other.der"}, "no answer within 2 s; is server_certificate"),
        ({"key": "nowhere.pem"}, r"the certificates cannot be used .*nowhere\.pem"),
        ({"certificate": "line.pem"}, "the certificates cannot be used"),
    ],
)
def test_a_client_or_a_server_that_is_not_trusted_is_refused(
    plant: Plant,
    certificates: Path,
    monkeypatch: pytest.MonkeyPatch,
    other: dict[str, str],
    text: str,
) -> None:
    monkeypatch.setenv("PLANT_PASSWORD", PASSWORD)
    files = {setting: str(certificates / file) for setting, file in other.items()}
    settings = msgspec.structs.replace(secure_config(plant.port, certificates), **files)
    remote = OpcUa(settings)
    with pytest.raises(SinkError, match=text):
        remote.beat(is_held=False)
    remote.disconnect()


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"nodes": {}}, "name the nodes to write to"),
        ({"nodes": {"verdict": "Line3.Verdict"}}, "write a node id like"),
        ({"target": "10.0.0.5:4840"}, "write it like opc.tcp://host:4840"),
        ({"security": "Basic256Sha256"}, "needs certificate and key"),
        ({"target": "opc.tcp://bob:secret@plc"}, "a password would travel readable"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, object], text: str) -> None:
    table = {"kind": "opcua", "target": "opc.tcp://plc", "nodes": {"verdict": "ns=2;s=V"}}
    with pytest.raises(UnknownOptionError, match=text) as caught:
        OpcUa(msgspec.convert(table | settings, OpcUaSink))
    assert "secret" not in str(caught.value)


def test_the_command_line_takes_an_address_and_nodes() -> None:
    table = parse_sink("opc.tcp://10.0.0.5:4840/plc?nodes.verdict=ns=2;s=Line3.Verdict")
    assert (table["kind"], table["target"]) == ("opcua", "opc.tcp://10.0.0.5:4840/plc")
    assert table["nodes"]["verdict"] == "ns=2;s=Line3.Verdict"
