"""Two machines whose network can be slow, lossy or cut.

Each machine is a network namespace with a tap device. This process moves the Ethernet frames from
one device to the other, and delays or drops them; TCP above is that of the kernel. It needs no
rights but those that `unshare --map-root-user --net` gives, and the file /dev/net/tun.
"""

import contextlib
import fcntl
import heapq
import itertools
import os
import random
import selectors
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

TUN = Path("/dev/net/tun")
TUNSETIFF = 0x400454CA  # of linux/if_tun.h
TAP_WITHOUT_HEADER = 0x0002 | 0x1000  # IFF_TAP | IFF_NO_PI
MOST_FRAME_BYTES = 65536
DEVICE = "tap0"


class Link:
    """Moves frames between two tap devices. Its faults can be changed at any time."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.delay_seconds = 0.0
        self.loss = 0.0  # share of the frames
        self.is_cut = False
        self.n_frames = 0
        self.n_lost = 0
        self.devices: list[int] = []
        self.waiting: list[tuple[float, int, int, bytes]] = []  # due time, number, device, frame
        self.numbers = itertools.count()
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._move, daemon=True)

    def connect(self, devices: list[int]) -> None:
        """Begin to move frames between two devices, given as file descriptors."""
        self.devices = devices
        self.thread.start()

    def close(self) -> None:
        """End the thread, and close the devices."""
        self.stop.set()
        if self.thread.ident is not None:
            self.thread.join()
        for device in self.devices:
            os.close(device)

    def _move(self) -> None:
        with selectors.DefaultSelector() as selector:
            for device in self.devices:
                os.set_blocking(device, False)
                selector.register(device, selectors.EVENT_READ)
            while not self.stop.is_set():
                due = self.waiting[0][0] - time.monotonic() if self.waiting else 0.05
                for key, _ in selector.select(max(0.0, min(due, 0.05))):
                    try:
                        self._receive(key.fd)
                    except BlockingIOError:
                        pass
                    except OSError:  # a machine has ended, and its device with it
                        selector.unregister(key.fd)
                self._send_due()

    def _receive(self, device: int) -> None:
        frame = os.read(device, MOST_FRAME_BYTES)
        self.n_frames += 1
        if self.is_cut or self.rng.random() < self.loss:
            self.n_lost += 1
            return
        [other] = [found for found in self.devices if found != device]
        due = time.monotonic() + self.delay_seconds * self.rng.uniform(0.8, 1.2)
        heapq.heappush(self.waiting, (due, next(self.numbers), other, frame))

    def _send_due(self) -> None:
        while self.waiting and self.waiting[0][0] <= time.monotonic():
            _, _, device, frame = heapq.heappop(self.waiting)
            with contextlib.suppress(OSError):  # a machine has ended
                os.write(device, frame)


def address(machine: int) -> str:
    """Return the address of a machine."""
    return f"10.9.0.{machine + 1}"


def why_impossible() -> str:
    """Return why there can be no machines here; empty if there can."""
    if not shutil.which("unshare") or not shutil.which("ip"):
        return "there is no unshare or no ip command"
    if not os.access(TUN, os.R_OK | os.W_OK):
        return f"{TUN} cannot be used"
    done = subprocess.run(
        ["unshare", "--map-root-user", "--net", "ip", "tuntap", "add", DEVICE, "mode", "tap"],
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stderr.strip()


@contextlib.contextmanager
def machines(
    commands: list[list[str]], logs: list[Path], link: Link
) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Run one command on each of two machines, and give their processes.

    Processes that are still running after the block are killed.
    """
    with contextlib.ExitStack() as stack:
        processes = []
        devices = []
        stack.callback(link.close)
        for machine, (command, path) in enumerate(zip(commands, logs, strict=True)):
            log = stack.enter_context(path.open("w"))
            receiver, sender = socket.socketpair()
            enter = ["unshare", "--map-root-user", "--net", sys.executable, __file__]
            process = subprocess.Popen(
                [*enter, str(sender.fileno()), address(machine), *command],
                pass_fds=[sender.fileno()],
                stdout=log,
                stderr=log,
            )
            stack.callback(end, process)
            sender.close()
            _, [device], _, _ = socket.recv_fds(receiver, 1, 1)
            receiver.close()
            devices.append(device)
            processes.append(process)
        link.connect(devices)
        yield processes


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill a process, unless it has ended. The ranks of a torchrun notice its end, and end too."""
    process.kill()
    process.wait()


def start_machine(channel: int, own_address: str, command: list[str]) -> None:
    """Configure the network of this namespace, send its device to the parent, and run a command."""
    device = os.open(TUN, os.O_RDWR)
    fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH", DEVICE.encode(), TAP_WITHOUT_HEADER))
    for arguments in (
        "link set lo up",
        f"addr add {own_address}/24 dev {DEVICE}",
        f"link set {DEVICE} up",
    ):
        subprocess.run(["ip", *arguments.split()], check=True)
    with socket.socket(fileno=channel) as parent:
        socket.send_fds(parent, [b"device"], [device])
    os.close(device)
    os.execvp(command[0], command)


if __name__ == "__main__":
    start_machine(int(sys.argv[1]), sys.argv[2], sys.argv[3:])
