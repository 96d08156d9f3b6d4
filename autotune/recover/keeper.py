"""Keep a command from outliving its supervisor: `python -I -S keeper.py SUPERVISOR STATUS_FD RECORD LIMIT COMMAND …`.

It leads a session of its own, starts the command in it, and waits. When the supervisor has died it ends every process
of the session and every descendant, those in sessions of their own included: it is their subreaper. Standard library
only, and little of it: it starts in some 40 ms and holds 5 MiB of its own for as long as a run lasts.
"""

import contextlib
import ctypes
import os
import signal
import sys
import time

PR_SET_PDEATHSIG = 1  # linux/prctl.h
PR_SET_CHILD_SUBREAPER = 36
GRACE_S = 5.0  # between SIGTERM and SIGKILL, once the supervisor has died
KILLED_S = 10.0  # for killed processes to be gone; one that waits for a device may never be
_LOOK_S = 1.0  # between looks at the supervisor, where the kernel did not tell
_POLL_S = 0.1


class Process:
    """One line of /proc: who, whose child, which session, and since when, in ticks since boot.

    A pid with its ticks names a process for as long as the machine is up: neither changes when the clock is set.
    """

    __slots__ = ("alive", "group", "parent", "pid", "session", "ticks")

    def __init__(self, pid: int, stat: bytes) -> None:
        fields = stat[stat.rindex(b")") + 2 :].split()
        self.pid = pid
        self.alive = fields[0] not in (b"Z", b"X")
        self.parent, self.group, self.session = int(fields[1]), int(fields[2]), int(fields[3])
        self.ticks = int(fields[19])


def read_process(pid: int) -> Process | None:
    """None where there is no such process."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return Process(pid, file.read())
    except (OSError, ValueError):
        return None


def read_processes() -> dict[int, Process]:
    found = (read_process(int(name)) for name in os.listdir("/proc") if name.isdigit())
    return {process.pid: process for process in found if process is not None}


def members(keeper: int, processes: dict[int, Process] | None = None) -> list[Process]:
    """Living processes of the keeper's session, and its descendants in any session; itself left out."""
    processes = read_processes() if processes is None else processes
    mine = {keeper} | {pid for pid, process in processes.items() if process.session == keeper}
    children: dict[int, list[int]] = {}
    for process in processes.values():
        children.setdefault(process.parent, []).append(process.pid)
    waiting = list(mine)
    while waiting:
        new = [pid for pid in children.get(waiting.pop(), ()) if pid not in mine]
        mine.update(new)
        waiting += new
    return [processes[pid] for pid in mine if pid != keeper and pid in processes and processes[pid].alive]


def send(process: Process, number: int) -> bool:
    """Signal exactly this process: one that has taken over its pid is spared. Whether it was sent."""
    try:
        handle = os.pidfd_open(process.pid)
    except OSError:  # gone, or a kernel before 5.3
        return _send_by_pid(process, number)
    try:
        if not is_same(process):
            return False
        signal.pidfd_send_signal(handle, number)
    except OSError:
        return False
    finally:
        os.close(handle)
    return True


def _send_by_pid(process: Process, number: int) -> bool:
    if not is_same(process):
        return False
    try:
        os.kill(process.pid, number)
    except OSError:
        return False
    return True


def is_same(process: Process) -> bool:
    now = read_process(process.pid)
    return now is not None and now.alive and now.ticks == process.ticks


def boot_id() -> str:
    """Names this boot of the machine; empty where the kernel does not say."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return file.read().strip()
    except OSError:
        return ""


def die_with_parent(number: int) -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)


class Keeper:
    """Starts the command, waits for its end, and tells both the supervisor and a file."""

    def __init__(self, supervisor: int, status: int, record: str, limit_bytes: int, command: list[str]) -> None:
        self.supervisor, self.status, self.record = supervisor, status, record
        self.limit_bytes, self.command = limit_bytes, command
        self.pid = 0
        self.ticks = 0
        self.peak_rss_bytes = 0  # of the largest of the command and the children that it waited for

    def run(self) -> None:
        if self.start():
            self.write_record(None)
            self.tell(f"started {self.pid} {self.ticks}")
            silence()
            self.wait()

    def start(self) -> bool:
        """Whether the command could be started; the supervisor is told why it could not."""
        told, tell = os.pipe()  # closed by a successful exec
        self.pid = os.fork()
        if self.pid == 0:
            self.become_command(tell)
        os.close(tell)
        with contextlib.suppress(OSError):  # it has done so itself, or is gone
            os.setpgid(self.pid, self.pid)
        process = read_process(self.pid)
        self.ticks = process.ticks if process else 0
        error = os.read(told, 16)
        os.close(told)
        if error:
            self.tell(f"failed {error.decode()}")
        return not error

    def become_command(self, tell: int) -> None:
        """In the child: its own process group, the memory limit, the signals as a shell would leave them."""
        try:
            keeper = os.getppid()
            os.setpgid(0, 0)
            die_with_parent(signal.SIGKILL)  # where the keeper is killed
            if os.getppid() != keeper:
                os._exit(1)
            limit_data(self.limit_bytes)
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE, signal.SIGXFSZ):
                signal.signal(number, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_SETMASK, ())
            os.execvp(self.command[0], self.command)
        except OSError as error:
            os.write(tell, str(error.errno).encode())
        finally:
            os._exit(127)

    def wait(self) -> None:
        """Until the command and all that it left behind are gone, or the supervisor is and they are ended."""
        ended = False
        while os.getppid() == self.supervisor:
            code = self.reap()
            if code is not None:
                ended = True
                self.write_record(code)
                self.tell(f"ended {code} {self.peak_rss_bytes}")
            if ended and not members(os.getpid()):
                return
            signal.sigtimedwait(_WAITED, _POLL_S if ended else _LOOK_S)
        self.end_all()

    def reap(self) -> int | None:
        """Collect the dead; the command's exit code (negative: a signal), where it is among them."""
        code = None
        with contextlib.suppress(ChildProcessError):
            while (found := os.wait4(-1, os.WNOHANG))[0]:
                if found[0] == self.pid:
                    code = os.waitstatus_to_exitcode(found[1])
                    self.peak_rss_bytes = found[2].ru_maxrss * 1024
        return code

    def end_all(self) -> None:
        for process in members(os.getpid()):
            send(process, signal.SIGTERM)
            send(process, signal.SIGCONT)  # a stopped one hears nothing else
        kill_at = time.monotonic() + GRACE_S
        while time.monotonic() < kill_at + KILLED_S:
            code = self.reap()
            if code is not None:
                self.write_record(code)
            left = members(os.getpid())
            if not left:
                return
            if time.monotonic() >= kill_at:
                for process in left:
                    send(process, signal.SIGKILL)
            time.sleep(_POLL_S)

    def write_record(self, code: int | None) -> None:
        """For whoever comes later. A full disk keeps no run from going on."""
        keeper = read_process(os.getpid())
        text = (
            f'{{"schema": "autotune.process/1", "boot": "{boot_id()}", "supervisor": {self.supervisor},'
            f' "keeper": {os.getpid()}, "keeper_ticks": {keeper.ticks if keeper else 0},'
            f' "pid": {self.pid}, "ticks": {self.ticks}, "exit_code": {"null" if code is None else code}}}\n'
        )
        with contextlib.suppress(OSError):
            handle = os.open(self.record + ".new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with open(handle, "w") as file:
                file.write(text)
            os.replace(self.record + ".new", self.record)

    def tell(self, line: str) -> None:
        with contextlib.suppress(OSError):  # the supervisor has died
            os.write(self.status, (line + "\n").encode())


def limit_data(limit_bytes: int) -> None:
    """Soft RLIMIT_DATA, 0 for none. The hard limit stays, so that the trainer can lift it to describe its error."""
    if limit_bytes:
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        soft = limit_bytes if hard == resource.RLIM_INFINITY else min(limit_bytes, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def silence() -> None:
    """Let go of the command's output: its end is seen when the command's own descriptors are closed."""
    null = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(null, number)
    os.close(null)


_WAITED = (signal.SIGCHLD, signal.SIGTERM) if hasattr(signal, "SIGCHLD") else ()


def main(arguments: list[str]) -> None:
    supervisor, status = int(arguments[0]), int(arguments[1])
    os.set_inheritable(status, False)
    # Blocked, not handled: what this process is told to ignore, its child is too. SIGTERM is the kernel's word for
    # "your parent has died"; from anybody else it only makes us look.
    signal.pthread_sigmask(signal.SIG_BLOCK, (*_WAITED, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT))
    die_with_parent(signal.SIGTERM)
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    if os.getppid() == supervisor:
        Keeper(supervisor, status, arguments[2], int(arguments[3]), arguments[4:]).run()


if __name__ == "__main__":
    main(sys.argv[1:])
