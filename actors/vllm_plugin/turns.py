"""How long a thread may keep a core while others wait for it.

An engine on CPUs shares its cores with the processes that pass its requests and tokens on, each for a fraction of a
millisecond. Linux lets a thread that wakes interrupt one whose turns are longer (since 6.12, where turns can be chosen;
older kernels take the call and change nothing), and gives both as much time as before.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
import sys

LONGEST_TURN_S = 0.1  # Linux knows no longer one
_SCHED_SETATTR = {"x86_64": 314, "aarch64": 274}
_ATTRIBUTES = "<IIQiIQQQ"  # struct sched_attr in its first form: size, policy, flags, nice, priority, runtime, …


def take_long_turns() -> bool:
    """Let threads that wake interrupt the calling one.

    Returns:
        Whether it could be asked for: on Linux, unless a sandbox forbids it.
    """
    number = _SCHED_SETATTR.get(platform.machine())
    if sys.platform != "linux" or number is None:
        return False
    policy, niceness = os.sched_getscheduler(0), os.getpriority(os.PRIO_PROCESS, 0)
    if policy not in (os.SCHED_OTHER, os.SCHED_BATCH):
        return False
    size = struct.calcsize(_ATTRIBUTES)
    attributes = struct.pack(_ATTRIBUTES, size, policy, 0, niceness, 0, int(LONGEST_TURN_S * 1e9), 0, 0)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(number, 0, attributes, 0) == 0:
        return True
    failed = ctypes.get_errno()
    if failed in (errno.EPERM, errno.ENOSYS, errno.EINVAL):
        return False
    raise OSError(failed, os.strerror(failed))
