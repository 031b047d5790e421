"""The process that walls programs off: started by its path, standard library only, forks two processes a program.

    python -I -S sandbox_warden.py SETTINGS_AS_JSON

The warden never reads what it runs. Each request brings three open files: the program, the tests, and a pipe for the
verdict. Two processes are forked. The program's process gets the program alone; the tests' process gets the tests and
the pipe. A socket between them carries plain data: calls one way, returned values the other (sandbox_roles.py). So a
program that searches its memory finds no expected value, and what it prints or sends is never a verdict.

Where the kernel allows it, the warden is the first process of namespaces of its own (processes, mounts, network, IPC)
and the programs live in a root of read-only libraries with one small scratch folder. The end of the warden, for
whatever reason, is then the end of all that it started.
"""

import contextlib
import ctypes
import json
import os
import resource
import select
import shutil
import signal
import socket
import sys
import tempfile

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import sandbox_filter  # pyright: ignore[reportMissingImports]
import sandbox_roles  # pyright: ignore[reportMissingImports]

sys.path.pop(0)

NEW_NAMESPACES = 0x00020000 | 0x08000000 | 0x20000000 | 0x40000000 | 0x04000000  # mounts, IPC, processes, network, name
NEW_USER = 0x10000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
MNT_DETACH = 2
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS, PR_SET_CHILD_SUBREAPER = 1, 4, 24, 38, 36
JAIL, BOX = "/jail", "/box"
MOUNT_POINTS = ("/mnt", "/media", "/srv", "/opt", "/tmp")
LIBRARIES = ("/lib", "/lib32", "/lib64", "/usr/lib", "/usr/lib32", "/usr/lib64", "/usr/local/lib")
DEVICES = ("null", "zero", "urandom")

libc = ctypes.CDLL(None, use_errno=True)


def call(name, *arguments):
    """A function of the C library that returns 0, or an OSError."""
    values = [a.encode() if isinstance(a, str) else a for a in arguments]
    if getattr(libc, name)(*values) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def prctl(option, value):
    """prctl(2) with one value."""
    call("prctl", option, ctypes.c_ulong(value), ctypes.c_ulong(0), ctypes.c_ulong(0), ctypes.c_ulong(0))


def mount(source, target, kind, flags, data=None):
    """mount(2)."""
    call("mount", source, target, kind, ctypes.c_ulong(flags), data)


# ----------------------------------------------------------------------------------------------------------- namespaces


def enter_namespaces():
    """Become the first process of new namespaces; the old process stays as a shell that ends with us."""
    try:
        call("unshare", NEW_NAMESPACES)
    except OSError:
        user, group = os.geteuid(), os.getegid()
        call("unshare", NEW_NAMESPACES | NEW_USER)
        for file, text in (("setgroups", "deny"), ("uid_map", f"1000 {user} 1"), ("gid_map", f"1000 {group} 1")):
            with open(f"/proc/self/{file}", "w") as handle:
                handle.write(text)
    child = os.fork()
    if child:
        os.closerange(3, 4096)
        _, status = os.waitpid(child, 0)
        os._exit(os.waitstatus_to_exitcode(status) & 0xFF)
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def locked_flags(path):
    """The flags of a mount that a remount must repeat (they are locked in a user namespace)."""
    flags = os.statvfs(path).f_flag
    return flags & (MS_NOSUID | MS_NODEV | 8 | 1024 | 2048)


def show(source, jail):
    """Bind a folder or file of the host into the jail, read-only with everything mounted below it."""
    target = jail + source
    if os.path.isdir(source):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.close(os.open(target, os.O_CREAT, 0o644))
    mount(source, target, None, MS_BIND | MS_REC)
    with open("/proc/self/mountinfo") as table:
        places = [line.split()[4].encode().decode("unicode_escape") for line in table]
    for place in places:
        if place == target or place.startswith(target + "/"):
            mount(None, place, None, MS_BIND | MS_REMOUNT | MS_RDONLY | locked_flags(place))


def build_root():
    """A root that holds the interpreter's libraries and three devices, and nothing else of the machine."""
    standard = os.path.dirname(os.path.dirname(os.path.realpath(os.__file__)))
    root = next(p for p in MOUNT_POINTS if os.path.isdir(p) and not standard.startswith(p + "/"))
    mount(None, "/", None, MS_REC | MS_PRIVATE)
    mount("none", root, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=0755")
    jail = root + JAIL
    os.mkdir(jail, 0o755)
    for path in (*LIBRARIES, standard):
        if os.path.islink(path):
            os.symlink(os.readlink(path), jail + path)
        elif os.path.isdir(path) and not os.path.ismount(jail + path) and not os.path.isdir(jail + path):
            show(path, jail)
    hide_packages(jail, standard)
    for name in DEVICES:
        show(f"/dev/{name}", jail)
    os.mkdir(jail + BOX)
    os.mkdir(root + "/old")
    mount(None, root, None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV)
    call("pivot_root", root, root + "/old")
    os.chdir("/")
    call("umount2", "/old", MNT_DETACH)


def hide_packages(jail, standard):
    """Put emptiness over installed packages: they are no part of what a program may use."""
    for folder in ("site-packages", "dist-packages"):
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        for place in (
            f"{standard}/{version}/{folder}",
            f"/usr/lib/python3/{folder}",
            f"/usr/local/lib/{version}/{folder}",
        ):
            if os.path.isdir(jail + place):
                mount("none", jail + place, "tmpfs", MS_RDONLY | MS_NOSUID | MS_NODEV, "size=4k,mode=0555")


def isolate(weak):
    """Wall this process off as far as the kernel allows; what that is, by name.

    Raises OSError where it does not allow it and `weak` is not set.
    """
    root = os.geteuid() == 0
    filtered = sandbox_filter.works(libc, lambda: prctl(PR_SET_NO_NEW_PRIVS, 1))
    if weak:
        if root and not open_to_all(os.__file__):
            # Another user could import nothing, and limits do not hold for root.
            raise OSError(0, f"root's limits do not hold, and no other user can read {os.__file__}")
        prctl(PR_SET_CHILD_SUBREAPER, 1)
        return {"processes": False, "network": filtered, "files": False, "user": root, "calls": filtered}
    enter_namespaces()
    build_root()
    return {"processes": True, "network": True, "files": True, "user": root, "calls": filtered}


def open_to_all(path):
    """Whether any user may read a file, as far as the permission bits say."""
    path = os.path.realpath(path)
    parents = []
    while path != "/":
        path = os.path.dirname(path)
        parents.append(path)
    return all(os.stat(parent).st_mode & 0o005 == 0o005 for parent in parents)


# -------------------------------------------------------------------------------------------------------------- forking


def drop_rights(user):
    """Give up every capability, and the user too where `user` is one."""
    header, empty = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    for capability in range(64):
        with contextlib.suppress(OSError):  # not ours to drop, or past the last one
            prctl(PR_CAPBSET_DROP, capability)
    if user is not None:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    call("capset", header, empty)
    prctl(PR_SET_NO_NEW_PRIVS, 1)


def set_limits(limits, processes):
    """The resources that one process may use."""
    seconds = int(limits["seconds"]) + 1
    for name, value in (
        ("RLIMIT_CPU", seconds),
        ("RLIMIT_AS", limits["memory"]),
        ("RLIMIT_FSIZE", limits["file_size"]),
        ("RLIMIT_NOFILE", limits["files"]),
        ("RLIMIT_NPROC", processes),
        ("RLIMIT_CORE", 0),
        ("RLIMIT_MEMLOCK", 0),
        ("RLIMIT_MSGQUEUE", 0),
    ):
        resource.setrlimit(getattr(resource, name), (value, value))


def start(role, descriptors, box, limits, user, protection, others):
    """Fork a process that plays `role` with the descriptors, and nothing else of ours."""
    jailed = protection["files"]
    child = os.fork()
    if child:
        return child
    try:
        os.setsid()
        nothing = os.open("/dev/null" if not jailed else f"{JAIL}/dev/null", os.O_RDWR)
        kept = [
            os.dup2(d, place) for place, d in enumerate([os.dup2(d, 200 + n) for n, d in enumerate(descriptors)], 100)
        ]
        for standard in (0, 1, 2):
            os.dup2(nothing, standard)
        os.closerange(3, 100)
        os.closerange(100 + len(kept), 4096)
        kept = [os.dup2(d, 3 + n) for n, d in enumerate(kept)]
        os.closerange(3 + len(kept), 4096)
        if jailed:
            os.chroot(JAIL)
        os.chdir(box)
        os.environ.clear()
        os.environ.update({"HOME": box, "TMPDIR": box, "LANG": "C.UTF-8", "PATH": ""})
        tempfile.tempdir = box
        set_limits(limits, limits["processes"] + others)
        drop_rights(user)
        prctl(PR_SET_DUMPABLE, 0)
        if protection["calls"]:
            sandbox_filter.install(libc)
        role(*kept)
    except BaseException:  # whatever it was: no verdict was written, which is what counts
        os._exit(1)
    os._exit(0)


def end_programs():
    """Kill and reap everything that was started, children of children too."""
    while True:
        if os.getpid() == 1:
            with contextlib.suppress(ProcessLookupError):
                os.kill(-1, signal.SIGKILL)
        else:
            for child in descendants():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def descendants():
    """Process ids below this one; orphans come back to it, for it is a subreaper."""
    parents = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError), open(f"/proc/{name}/stat") as file:
                parents[int(name)] = int(file.read().rpartition(")")[2].split()[1])
    found, new = [], [os.getpid()]
    while new:
        new = [pid for pid, parent in parents.items() if parent in new]
        found += new
    return found


def run(files, limits, users, protection):
    """Start the program and its tests; the two processes are left running."""
    program, tests, verdict = files
    jailed = protection["files"]
    asking, answering = socket.socketpair()
    others = (
        0 if protection["user"] else 3
    )  # without users of their own, the tests' process, the warden and its shell count too
    box = BOX if jailed else tempfile.mkdtemp(prefix="d1lit-box-")
    try:
        if jailed:
            owner = users[1] if users[1] is not None else 1000
            options = f"size={limits['folder']},nr_inodes=256,mode=0700,uid={owner},gid={owner}"
            mount("none", JAIL + BOX, "tmpfs", MS_NOSUID | MS_NODEV, options)
        elif users[1] is not None:
            os.chown(box, users[1], users[1])
        start(sandbox_roles.serve_program, [program, answering.fileno()], box, limits, users[1], protection, others)
        start(sandbox_roles.run_tests, [tests, asking.fileno(), verdict], "/", limits, users[0], protection, others)
    finally:
        asking.close()
        answering.close()
    return box


def remove(box, jailed):
    """Remove the scratch folder with all that was written."""
    if jailed:
        with contextlib.suppress(OSError):
            call("umount2", JAIL + BOX, MNT_DETACH)
    else:
        shutil.rmtree(box, ignore_errors=True)


def main():
    """Serve requests until the client goes away."""
    settings = json.loads(sys.argv[1])
    link = socket.socket(fileno=settings["link"])
    limits, number = settings["limits"], os.getpid()
    sandbox_roles.import_common_modules()  # now, for behind the wall the libraries have another root
    try:
        protection = isolate(settings["weak"])
    except OSError as error:
        link.sendall(json.dumps({"error": str(error)}).encode() + b"\n")
        return
    prctl(PR_SET_DUMPABLE, 0)  # only now: an undumpable process may not write its own user map
    # Users that nobody has: their processes are counted, signalled and traced apart from everyone else's.
    first = 60_000 + number % 2_500 * 2
    users = (first, first + 1) if protection["user"] else (None, None)
    jailed = protection["files"]
    link.sendall(json.dumps(protection).encode() + b"\n")
    while True:
        message, files, _, _ = socket.recv_fds(link, 1, 3)
        if not message:
            return
        box = run(files, limits, users, protection)
        for file in files:
            os.close(file)
        # Any word of the client, its end, or a deadline that only matters if the client hangs.
        select.select([link], [], [], limits["seconds"] + 1.0)
        end_programs()
        remove(box, jailed)
        if not link.recv(1):
            return
        link.sendall(b"1")


if __name__ == "__main__":
    main()
