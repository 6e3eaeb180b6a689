"""Which address and device processes reach each other by; for real in network namespaces, in campaigns/cluster."""

import socket

import pytest

from onehour.dist import network
from onehour.dist.launched import Launched
from onehour.dist.network import GLOO_DEVICE, Host, choose_device, loopback, this_host

PLACE = Launched(rank=0, size=2, address="gpu07", port=20017)
HERE, THERE = Host("gpu07", "a:1", ""), Host("gpu08", "b:1", "10.0.0.8")
DEVICES = [(1, "lo"), (2, "eth0"), (3, "ib0")]


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """A host with a network of two devices; what its names stand for, to be changed."""
    names = {"gpu07": ["10.0.0.7"]}
    addresses = {"lo": ["127.0.0.1"], "eth0": ["192.168.0.7"], "ib0": ["10.0.0.7"]}
    monkeypatch.delenv(GLOO_DEVICE, raising=False)
    monkeypatch.setattr("onehour.dist.network.socket.if_nameindex", lambda: DEVICES)
    monkeypatch.setattr("onehour.dist.network.socket.gethostname", lambda: "gpu07")
    monkeypatch.setattr(network, "_addresses", lambda name: names.get(name, []))
    monkeypatch.setattr(network, "_of_device", addresses.__getitem__)
    monkeypatch.setattr(network, "_is_here", lambda address: any(address in each for each in addresses.values()))
    monkeypatch.setattr(network, "_address_towards", lambda name: "10.0.0.7" if name == "10.0.0.8" else "")
    return names


def test_on_one_machine_it_is_the_loopback_device(devices: dict[str, list[str]]):
    assert choose_device(Launched(size=2, address="localhost"), []) == "lo"
    assert choose_device(PLACE, [HERE, HERE]) == "lo"


def test_a_name_that_other_hosts_can_use_is_left_to_gloo(devices: dict[str, list[str]]):
    assert choose_device(PLACE, [HERE, THERE]) is None


@pytest.mark.parametrize("found", [["127.0.1.1"], ["::1"], [], ["10.9.9.9"]])
def test_where_the_name_is_of_no_use_the_device_towards_the_others_is_found(
    devices: dict[str, list[str]], found: list[str]
):
    devices["gpu07"] = found
    assert choose_device(PLACE, [HERE, THERE]) == "ib0"
    own = Host("gpu07", "a:1", "192.168.0.7")  # as process 1, which knows how it reaches process 0
    assert choose_device(Launched(rank=1, size=2, address="gpu08"), [THERE, own]) == "eth0"


@pytest.mark.parametrize(("found", "said"), [(["127.0.1.1"], "is 127.0.1.1"), ([], "has no address")])
def test_where_none_is_found_the_variable_and_what_cannot_be_bound_are_named(
    devices: dict[str, list[str]], found: list[str], said: str
):
    devices["gpu07"] = found
    with pytest.raises(ValueError, match=rf"gpu07, {said} here, which cannot be bound .*set GLOO_SOCKET_IFNAME .*ib0"):
        choose_device(PLACE, [HERE, Host("gpu08", "b:1", "")])


def test_a_device_that_a_user_names_must_be_there(devices: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(GLOO_DEVICE, "ib0")
    assert choose_device(PLACE, [HERE, THERE]) is None
    monkeypatch.setenv(GLOO_DEVICE, "ib1")
    with pytest.raises(
        ValueError, match="GLOO_SOCKET_IFNAME is 'ib1', but gpu07 has no network device ib1; expected one"
    ):
        choose_device(PLACE, [HERE, THERE])


def test_processes_of_one_machine_share_its_name_and_need_no_address():
    here = this_host(Launched(size=2, address="127.0.0.1"))
    assert here == this_host(Launched(rank=1, size=2, address="127.0.0.1"))
    assert (here.name, here.address) == (socket.gethostname(), "")


@pytest.mark.parametrize(("without", "expected"), [((), "127.0.0.1"), (("127.0.0.1",), "::1")])
def test_without_127_0_0_1_processes_meet_at_the_other_loopback_address(
    monkeypatch: pytest.MonkeyPatch, without: tuple[str, ...], expected: str
):
    refuse(monkeypatch, *without)
    if expected == "::1" and not network._is_here("::1"):
        pytest.skip("this machine has no IPv6")
    assert loopback() == expected


def test_without_a_loopback_device_it_is_said_what_cannot_be_bound(monkeypatch: pytest.MonkeyPatch):
    refuse(monkeypatch, "127.0.0.1", "::1")
    with pytest.raises(ValueError, match=r"neither 127\.0\.0\.1 \(.*\) nor ::1 \(.*\) can be bound.*ip link set lo up"):
        loopback()


def refuse(monkeypatch: pytest.MonkeyPatch, *addresses: str) -> None:
    """Take addresses away from this machine."""

    class Socket(socket.socket):
        def bind(self, address: tuple[str, int]) -> None:  # pyright: ignore[reportIncompatibleMethodOverride] - enough here
            if address[0] in addresses:
                raise OSError(99, "Cannot assign requested address")
            super().bind(address)

    monkeypatch.setattr("onehour.dist.network.socket.socket", Socket)
