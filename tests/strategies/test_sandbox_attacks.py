"""Malicious programs, on both back ends. Tests check that no harm was done, not that an error was raised.

Every attack is followed by the same look around: no secret was told, nothing outside was written or changed,
nobody connected, no process is left, the answer came in time and in bounds, and the next program runs and
finds nothing of this one. What an attack reaches for that cannot be seen from outside it prints as REACHED.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import pytest

from viaticum.strategies.sandbox import Limits, Sandbox, default_sandbox
from viaticum.strategies.sandbox.bubblewrap import BubblewrapSandbox
from viaticum.strategies.sandbox.monty import MontySandbox
from viaticum.strategies.sandbox.worker_main import SCRATCH_BYTES

FILE_SECRET = "hedgehog-41-in-a-file"
ENV_SECRET = "badger-97-in-the-environment"
LIMITS = Limits(seconds=0.4, memory_bytes=64 * 2**20, output_bytes=4096)

SYSCALL = (
    "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\ndef reach(what, value):\n"
    "    if value >= 0: print('REACHED', what)\n"
)
PASSWORDS = "/etc/passwd"
ESCAPED = (
    "[c for c in ().__class__.__base__.__subclasses__() if c.__name__ == "
    "'_wrap_close'][0].__init__.__globals__"
)

# Name: program. @SECRET@ and @TARGET@ are paths outside, @PORT@ a listening port, @PID@ this process.
ATTACKS: dict[str, str] = {
    # files outside, read
    "read a secret": "print(open('@SECRET@').read())",
    "read through pathlib": "import pathlib\nprint(pathlib.Path('@SECRET@').read_text())",
    "read with os.open": "import os\nprint(os.read(os.open('@SECRET@', 0), 99))",
    "read with io": "import io\nprint(io.FileIO('@SECRET@').read())",
    "read through a relative path": "print(open('../' * 20 + '@SECRET@'[1:]).read())",
    "read with mmap": "import mmap, os\nprint(mmap.mmap(os.open('@SECRET@', 0), 0, prot=1)[:])",
    "read with numpy": "import numpy\nprint(numpy.fromfile('@SECRET@', dtype='u1').tobytes())",
    "read with numpy.genfromtxt": "import numpy\nprint(numpy.genfromtxt('@SECRET@', dtype=str))",
    "read with linecache": "import linecache\nprint(linecache.getlines('@SECRET@'))",
    "read with fileinput": "import fileinput\nprint(list(fileinput.input('@SECRET@')))",
    "read as a module": (
        "import runpy\ntry:\n    runpy.run_path('@SECRET@')\nexcept BaseException as e:\n    print(e, e.text)"
    ),
    "read with a C library": (
        "import ctypes\nlibc = ctypes.CDLL(None)\nb = ctypes.create_string_buffer(99)\n"
        "print(libc.read(libc.open(b'@SECRET@', 0), b, 99), b.value)"
    ),
    "read passwords": (
        "for f in ('/etc/passwd', '/etc/shadow', '/etc/hostname'):\n    try:\n"
        "        print('REACHED', open(f).read())\n    except OSError:\n        pass"
    ),
    "list folders outside": "import os\nprint('REACHED', os.listdir('@FOLDER@'))",
    "walk the tree": (
        "import os\nfor root, dirs, files in os.walk('/'):\n    if 'secret.txt' in files:\n"
        "        print('REACHED', open(root + '/secret.txt').read())"
    ),
    "read sympy's eval": "import sympy\nprint(sympy.sympify(\"open('@SECRET@').read()\"))",
    "read through numpy pickle": "import numpy\nnumpy.load('@SECRET@', allow_pickle=True)",
    # files outside, written
    "write a file": "open('@TARGET@', 'w').write('x')",
    "write through pathlib": "import pathlib\npathlib.Path('@TARGET@').write_text('x')",
    "append to a secret": "open('@SECRET@', 'a').write('x')",
    "remove a secret": "import os\nos.remove('@SECRET@')",
    "rename a secret": "import os\nos.rename('@SECRET@', '@TARGET@')",
    "make one folder": "import os\nos.mkdir('@TARGET@')",
    "make a folder": "import os\nos.makedirs('@TARGET@')",
    "change a mode": "import os\nos.chmod('@SECRET@', 0)",
    "write with numpy": "import numpy\nnumpy.zeros(3).tofile('@TARGET@')",
    "write over the interpreter": (
        "import os\nfor f in (os.__file__, '/worker_main.py', '/python/x', '/usr/x', '/x', '/dev/x'):\n"
        "    try:\n        open(f, 'a').write('x'); print('REACHED', f)\n    except OSError:\n        pass"
    ),
    "write over numpy": "import numpy\nopen(numpy.__file__, 'a').write('x')\nprint('REACHED')",
    "change a device": (
        "import os\nfor act in (lambda: os.chmod('/dev/null', 0), lambda: os.remove('/dev/null'), lambda: "
        "os.chown('/dev/null', 1000, 1000)):\n    try:\n        act(); print('REACHED')\n"
        "    except OSError:\n        pass"
    ),
    "write to a disk": (
        "import os\nfor name in ('vda', 'sda', 'nvme0n1', 'mem', 'kmsg'):\n    try:\n"
        "        os.open('/dev/' + name, os.O_RDWR); print('REACHED', name)\n    except OSError:\n"
        "        pass"
    ),
    "make a device": (
        "import os, stat\nos.mknod('/tmp/disk', 0o666 | stat.S_IFBLK, os.makedev(8, 0))\nprint('REACHED')"
    ),
    # links and descriptors
    "follow a symlink": "import os\nos.symlink('@SECRET@', '/tmp/link')\nprint(open('/tmp/link').read())",
    "write through a symlink": (
        "import os\nos.symlink('@TARGET@', '/tmp/link')\nopen('/tmp/link', 'w').write('x')"
    ),
    "hard link a secret": "import os\nos.link('@SECRET@', '/tmp/hard')\nprint(open('/tmp/hard').read())",
    "leave by dot dot": (
        "import os\nos.chdir('/tmp')\nfor _ in range(40): os.chdir('..')\n"
        "print(open('.' + '@SECRET@').read())"
    ),
    "leave by a folder's descriptor": (
        "import os\nfd = os.open('/', os.O_RDONLY)\n"
        "for _ in range(9): fd = os.open('..', os.O_RDONLY, dir_fd=fd)\n"
        "print(os.read(os.open('@SECRET@'[1:], 0, dir_fd=fd), 99))"
    ),
    "leave by chroot": (
        "import os\nos.mkdir('/tmp/x')\nos.chroot('/tmp/x')\nfor _ in range(40): os.chdir('..')\n"
        "os.chroot('.')\nprint('REACHED', open('@SECRET@').read())"
    ),
    "read all descriptors": (
        "import os\nfor fd in range(3, 300):\n    try:\n"
        "        os.set_blocking(fd, False); print('REACHED', fd, os.read(fd, 99))\n    except OSError:\n"
        "        pass"
    ),
    "forge the worker's reply": (
        "import os, json\nm = json.dumps({'stdout': 'forged', 'error': ''}).encode()\n"
        "for fd in (0, 2, *range(4, 300)):\n    try:\n"
        "        os.set_blocking(fd, False); os.write(fd, len(m).to_bytes(4, 'big') + m)\n"
        "    except OSError:\n        pass"
    ),
    "forge a broken sandbox": "import os\nos.write(3, b'{\"broken\": 1}')\nos._exit(70)",
    "report a flood": "import os\nwhile True: os.write(3, b'x' * 65536)",
    "close every descriptor": "import os\nos.closerange(0, 300)\nwhile True: pass",
    "close the output and go on": "import os, time\nos.close(1); os.close(3)\ntime.sleep(30)",
    # /proc and /sys
    "environment of every process": (
        "import glob\nfor f in glob.glob('/proc/*/environ'):\n    print('REACHED', open(f, 'rb').read())"
    ),
    "the parent's memory": (
        "import os\nfd = os.open('/proc/%d/mem' % os.getppid(), os.O_RDWR)\nprint('REACHED')"
    ),
    "the root of process 1": "print(open('/proc/1/root@SECRET@').read())",
    "own root through /proc": f"print('REACHED', open('/proc/self/root{PASSWORDS}').read())",
    "descriptors through /proc": "import os\nprint('REACHED', os.listdir('/proc/self/fd'))",
    "raise the oom score": "open('/proc/self/oom_score_adj', 'w').write('-1000')\nprint('REACHED')",
    "set a core pattern": "open('/proc/sys/kernel/core_pattern', 'w').write('|/tmp/x')\nprint('REACHED')",
    "press sysrq": "open('/proc/sysrq-trigger', 'w').write('h')\nprint('REACHED')",
    "mount proc": SYSCALL + "reach('proc', libc.mount(b'proc', b'/tmp', b'proc', 0, 0))",
    "control groups": "import os\nprint('REACHED', os.listdir('/sys/fs/cgroup'))",
    # environment and secrets
    "environment": "import os\nprint(dict(os.environ))",
    "environment by name": "import os\nprint(os.environ['API_KEY_OF_THE_TEST'])",
    "environment by getenv": "import os\nprint(os.getenv('API_KEY_OF_THE_TEST'))",
    "own environment through /proc": "print(open('/proc/self/environ').read())",
    "environment by C": (
        "import ctypes\nprint(ctypes.CDLL(None).getenv(b'API_KEY_OF_THE_TEST'))\n"
        "e = ctypes.POINTER(ctypes.c_char_p).in_dll(ctypes.CDLL(None), 'environ')\ni = 0\nwhile e[i]:\n"
        "    print(e[i]); i += 1"
    ),
    "what the stack holds": (
        "import ctypes\nl = ctypes.CDLL(None)\ne = ctypes.cast(ctypes.POINTER(ctypes.c_char_p).in_dll(l, "
        "'environ')[0], ctypes.c_void_p).value\nprint(ctypes.string_at(e - 2000, 4000))"
    ),
    "the request in memory": (
        "import gc\nfor o in gc.get_objects():\n    if isinstance(o, dict) and 'seccomp' in o and "
        "isinstance(o['seccomp'], str):\n        print(str(o)[:50])"
    ),
    "command line": "import sys\nprint(sys.argv, sys.orig_argv, sys.path)",
    "the user's home": (
        "import os\nfor p in ('~', '~root', '/root', '/home'):\n    try:\n"
        "        print('REACHED', os.listdir(os.path.expanduser(p))) if p != '~' else None\n"
        "    except OSError:\n        pass"
    ),
    "input": "print('REACHED', repr(input()))",
    # network
    "connect to localhost": (
        "import socket\nsocket.create_connection(('127.0.0.1', @PORT@)).send(b'x')\nprint('REACHED')"
    ),
    "connect over IPv6": (
        "import socket\ns = socket.socket(socket.AF_INET6)\ns.connect(('::1', @PORT@))\nprint('REACHED')"
    ),
    "connect with http.client": (
        "import http.client\nhttp.client.HTTPConnection('127.0.0.1', @PORT@).connect()\nprint('REACHED')"
    ),
    "fetch a page": (
        "import urllib.request\nprint('REACHED', urllib.request.urlopen('http://127.0.0.1:@PORT@', "
        "timeout=0.2).read())"
    ),
    "connect from asyncio": (
        "import asyncio\nasyncio.run(asyncio.open_connection('127.0.0.1', @PORT@))\nprint('REACHED')"
    ),
    "send a datagram": (
        "import socket\nsocket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', "
        "@PORT@))\nprint('REACHED')"
    ),
    "listen": "import socket\ns = socket.create_server(('0.0.0.0', 0))\nprint('REACHED')",
    "connect by C": SYSCALL + "reach('socket', libc.socket(2, 1, 0))",
    "netlink": "import socket\nsocket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)\nprint('REACHED')",
    "abstract unix socket": "import socket\nsocket.socket(socket.AF_UNIX).connect('\\0x')\nprint('REACHED')",
    "kernel crypto socket": "import socket\nsocket.socket(38, socket.SOCK_SEQPACKET)\nprint('REACHED')",
    # locks on what this machine shares
    "a lease on a library": (
        "import fcntl, os\nfcntl.fcntl(os.open(os.__file__, 0), 1024, 0)\nprint('REACHED')"
    ),
    # new processes and threads
    "fork bomb": (
        "import os\nwhile True:\n    try:\n        if os.fork() == 0: print('REACHED')\n    except OSError:\n"
        "        pass"
    ),
    "run a shell": "import os\nos.system('touch @TARGET@')",
    "run a shell by __import__": "__import__('os').system('touch @TARGET@')",
    "run a shell in exec": "exec(\"import os\\nos.system('touch @TARGET@')\")",
    "run a process": "import subprocess\nsubprocess.run(['touch', '@TARGET@'])",
    "spawn": "import os\nos.posix_spawn('/usr/bin/touch', ['touch', '@TARGET@'], {})",
    "replace itself": "import os\nos.execv('/usr/bin/env', ['env'])",
    "a pool of processes": "from multiprocessing import Pool\nprint('REACHED', Pool(4).map(abs, [1]))",
    "vfork by C": SYSCALL + "pid = libc.fork()\nif pid >= 0: print('REACHED')",
    "clone by C": SYSCALL
    + "import platform\nreach('clone', libc.syscall(56 if platform.machine() == 'x86_64' else 220, 17, "
    "0, 0, 0, 0))",
    "clone3 by C": SYSCALL
    + "b = ctypes.create_string_buffer(88)\nb[32] = 17\nreach('clone3', libc.syscall(435, b, 88))",
    "thread bomb": (
        "import threading, time\nfor _ in range(100000):\n    try:\n"
        "        threading.Thread(target=time.sleep, args=(60,)).start()\n    except RuntimeError:\n"
        "        pass"
    ),
    "small thread bomb": (
        "import threading, time\nthreading.stack_size(32768)\nn = 0\ntry:\n    while True:\n"
        "        threading.Thread(target=time.sleep, args=(60,), daemon=True).start(); n += 1\n"
        "except BaseException:\n    pass\nif n > 40: print('REACHED', n)"
    ),
    "threads that spin": (
        "import threading\ndef spin():\n    while True: pass\n"
        "for _ in range(8): threading.Thread(target=spin).start()"
    ),
    "zombie children": (
        "import os\nfor _ in range(1000):\n    try:\n        if os.fork() == 0: os._exit(0)\n"
        "        print('REACHED')\n    except OSError:\n        pass"
    ),
    "a child that stays": (
        "import os, time\nif os.fork() == 0:\n    os.setsid(); time.sleep(60)\nprint('REACHED')"
    ),
    "a daemon thread that stays": (
        "import threading, time\nthreading.Thread(target=time.sleep, args=(60,), daemon=True).start()\n"
        "print('done')"
    ),
    "a new session": "import os\nos.setsid()\nprint('REACHED')",
    # memory and output
    "one large string": "x = 'x' * 10**10",
    "memory bit by bit": "rows = []\nwhile True:\n    rows.append('y' * 10**5)",
    "memory in numpy": "import numpy\nx = numpy.ones(10**9)",
    "memory in anonymous files": (
        "import os\nfds = []\nwhile True:\n    fds.append(os.memfd_create('x')); os.write(fds[-1], b'x' * "
        "2**20); print('REACHED')"
    ),
    "memory in shared memory": (
        "from multiprocessing import shared_memory\nshared_memory.SharedMemory(create=True, size=2**30)\n"
        "print('REACHED')"
    ),
    "memory in mmap": (
        "import mmap\nrows = []\nwhile True:\n    m = mmap.mmap(-1, 2**24); m[:] = b'x' * 2**24; "
        "rows.append(m)"
    ),
    "memory in pipes": (
        "import os\nwhile True:\n    r, w = os.pipe(); os.set_blocking(w, False)\n    try:\n"
        "        while True: os.write(w, b'x' * 65536)\n    except BlockingIOError:\n        pass"
    ),
    "large powers": "x = 10 ** 10 ** 9",
    "a nested list": "x = []\nwhile True: x = [x, x]",
    "raise the limits": (
        "import resource\nresource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)\n"
        "print('REACHED')"
    ),
    "lock memory": SYSCALL + "reach('mlockall', libc.mlockall(3))",
    "output flood": "while True: print('flood' * 1000)",
    "one large output": "print('z' * 10**7)",
    "output by descriptor": "import os\nwhile True: os.write(1, b'z' * 65536)",
    "error flood": "import os\nwhile True: os.write(2, b'z' * 65536)",
    "a large error": "raise ValueError('z' * 10**7)",
    "a large last value": "'z' * 10**7",
    "output that is no text": "import os\nfor _ in range(100): os.write(1, bytes(range(256)))",
    # disk
    "fill the disk": (
        "n = 0\ntry:\n    while True:\n        with open('/tmp/%d' % n, 'wb') as f: f.write(b'x' * 2**20)\n"
        "        n += 1\nexcept OSError:\n    pass\nprint('REACHED' if n * 2**20 > @SCRATCH@ else 'full')"
    ),
    "one large file": "f = open('/tmp/x', 'wb')\nf.truncate(2**40)\nprint('REACHED')",
    "many files": (
        "n = 0\ntry:\n    while True:\n        open('/tmp/%d' % n, 'w').close(); n += 1\nexcept OSError:\n"
        "    pass\nprint('REACHED' if n > 5000 else 'full')"
    ),
    "many descriptors": (
        "rows = []\ntry:\n    while True: rows.append(open('/dev/null'))\nexcept OSError:\n    pass\n"
        "print('REACHED' if len(rows) > 100 else 'full')"
    ),
    "deep folders": "import os\nfor _ in range(100000):\n    os.mkdir('d'); os.chdir('d')",
    "shared memory folder": "open('/dev/shm/x', 'w').write('x')\nprint('REACHED')",
    # time
    "endless loop": "while True: pass",
    "endless sleep": "import time\ntime.sleep(1000)",
    "endless C": "sum(range(10**15))",
    "endless regular expression": "import re\nre.match('(a+)+$', 'a' * 40 + 'b')",
    "swallowed exceptions": (
        "while True:\n    try:\n        while True: pass\n    except BaseException:\n        pass"
    ),
    "ignored signals": (
        "import signal\nfor n in range(1, 65):\n    try:\n        signal.signal(n, signal.SIG_IGN)\n"
        "    except (OSError, ValueError):\n        pass\nwhile True: pass"
    ),
    "blocked signals": (
        "import signal\nsignal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))\nwhile True: pass"
    ),
    "stopped by itself": "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)",
    "an endless finally": "try:\n    pass\nfinally:\n    while True: pass",
    "an endless __del__": "class A:\n    def __del__(self):\n        while True: pass\nA()",
    "an endless __str__": (
        "class A:\n    def __str__(self):\n        while True: pass\n    __repr__ = __str__\nA()"
    ),
    "an endless error": "class A(Exception):\n    def __str__(self):\n        while True: pass\nraise A()",
    "an endless exit": "import atexit\ndef f():\n    while True: pass\natexit.register(f)",
    "a deadlock": "import threading\nl = threading.Lock(); l.acquire(); l.acquire()",
    "a timeout while holding a lock": (
        "import threading, time, sys\nl = threading.Lock()\ndef hold():\n    with l: time.sleep(1000)\n"
        "threading.Thread(target=hold).start()\nl.acquire()"
    ),
    "a timeout while holding a file lock": (
        "import fcntl, time\nf = open('/tmp/lock', 'w'); fcntl.flock(f, 2)\ntime.sleep(1000)"
    ),
    "a timeout while holding the output": (
        "import sys, time\nsys.stdout.write('x' * 1000)\nsys.stdout.buffer.raw\ntime.sleep(1000)"
    ),
    "an alarm": (
        "import signal, time\nsignal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)\n"
        "signal.signal(signal.SIGALRM, lambda *a: None)\nwhile True: pass"
    ),
    "an endless compile": (
        "exec('x = ' + '(' * 90 + '1' + ')' * 90)\nwhile True: compile('1+' * 3000 + '1', '', 'eval')"
    ),
    # recursion and crashes
    "deep recursion": "def f(n): return f(n + 1)\nf(0)",
    "unlimited recursion": "import sys\nsys.setrecursionlimit(10**9)\ndef f(n): return f(n + 1)\nf(0)",
    "recursion in C": (
        "import sys\nsys.setrecursionlimit(10**9)\nx = []\nfor _ in range(10**6): x = [x]\nrepr(x)"
    ),
    "deep brackets": "eval('(' * 100000 + ')' * 100000)",
    "read a null pointer": "import ctypes\nctypes.string_at(0)",
    "abort": "import os\nos.abort()",
    "broken bytecode": "def f(): pass\nf.__code__ = f.__code__.replace(co_code=b'\\x90\\x00' * 50)\nf()",
    "exit in the middle": "import os\nos._exit(0)",
    "kill itself": "import os\nos.kill(os.getpid(), 9)",
    # signals to others
    "kill everything": "import os\nos.kill(-1, 9)",
    "kill the parent": "import os\nos.kill(os.getppid(), 9)",
    "kill process 1": (
        "import os\nfor pid in range(1, 50):\n    try:\n        os.kill(pid, 9)\n    except OSError:\n"
        "        pass"
    ),
    "kill this test": "import os\nos.kill(@PID@, 9)",
    "kill the group": "import os\nos.killpg(0, 9)",
    "kill by C": SYSCALL
    + "import platform\nfor pid in range(2, 40): libc.syscall(234 if platform.machine() == 'x86_64' else "
    "131, pid, pid, 9)",
    # dunder and frame walks
    "the first subclass to os": (
        "().__class__.__bases__[0].__subclasses__()[0].__init__.__globals__['os'].system('touch @TARGET@')"
    ),
    "subclasses to os": ESCAPED + "['system']('touch @TARGET@')",
    "frames to the worker": (
        "import sys\nf = sys._getframe()\nwhile f:\n    for name in ('requests', 'replies'):\n"
        "        if name in f.f_locals: __import__('os').write(f.f_locals[name], b'\\0\\0\\0\\2{}')\n"
        "    f = f.f_back"
    ),
    "builtins by a traceback": (
        "try:\n    1 / 0\nexcept Exception as e:\n"
        "    e.__traceback__.tb_frame.f_builtins['open']('@TARGET@', 'w')"
    ),
    "builtins by a function": "(lambda: 0).__globals__['__builtins__'].open('@TARGET@', 'w')",
    "builtins of print": "print.__self__.open('@TARGET@', 'w')",
    "code made by hand": (
        "import types\ntypes.FunctionType(compile(\"open('@TARGET@', 'w')\", '', 'exec'), {'__builtins__': "
        "__builtins__})()"
    ),
    "importlib": "import importlib\nimportlib.import_module('subprocess').run(['touch', '@TARGET@'])",
    "a loader": (
        "import importlib.machinery\nm = importlib.machinery.SourceFileLoader('m', "
        "'@SECRET@').get_data('@SECRET@')\nprint(m)"
    ),
    "eval of an import": "eval(\"__import__('os').system('touch @TARGET@')\")",
    "patch the worker's modules": (
        'import json, os, sys\njson.dumps = lambda *a, **k: \'{"stdout": "forged", "error": ""}\'\n'
        "os.write = lambda *a: 0\nsys.modules.clear()"
    ),
    "a module named as another": (
        "open('/tmp/json.py', 'w').write('print(\"REACHED\")')\nimport sys\nsys.path.insert(0, '/tmp')"
    ),
    # pickle and ctypes
    "pickle": "import pickle\npickle.loads(b\"cos\\nsystem\\n(S'touch @TARGET@'\\ntR.\")",
    "a value that is a pickle": "class A:\n    def __reduce__(self): return (print, ('REACHED',))\nA()",
    "system by C": "import ctypes\nctypes.CDLL(None).system(b'touch @TARGET@')",
    "ptrace the parent": SYSCALL + "import os\nreach('ptrace', libc.ptrace(16, os.getppid(), 0, 0))",
    "read the parent's memory": SYSCALL
    + "import os\nb = ctypes.create_string_buffer(8)\nv = (ctypes.c_void_p * 2)(ctypes.addressof(b), 8)\n"
    "reach('process_vm_readv', libc.process_vm_readv(1, v, 1, v, 1, 0))",
    # privileges and the kernel
    "become root": (
        "import os\nfor act in (lambda: os.setuid(0), lambda: os.setgid(0), lambda: os.setresuid(0, 0, 0), "
        "lambda: os.setgroups([0])):\n    try:\n        act(); print('REACHED')\n    except OSError:\n"
        "        pass\nif 0 in os.getresuid() + os.getresgid(): print('REACHED')"
    ),
    "a namespace of its own": SYSCALL
    + "for f in (0x10000000, 0x20000, 0x20000000, 0x40000000): reach('unshare', libc.unshare(f))",
    "mount the disk": SYSCALL
    + "reach('mount', libc.mount(b'/', b'/tmp', None, 4096, None)); reach('umount', "
    "libc.umount2(b'/tmp', 2)); reach('pivot', libc.syscall(155, b'/tmp', b'/tmp'))",
    "mount it writable": SYSCALL + "reach('remount', libc.mount(None, b'/usr', None, 32 | 4096, None))",
    "take a capability": SYSCALL
    + "h = (ctypes.c_uint32 * 2)(0x20080522, 0)\nd = (ctypes.c_uint32 * 6)(*[0xffffffff] * 6)\n"
    "reach('capset', libc.capset(h, d))",
    "undo the filter": SYSCALL
    + "reach('seccomp', libc.prctl(22, 0, 0, 0, 0)); reach('dumpable', libc.prctl(4, 1, 0, 0, 0))",
    "keys of the kernel": SYSCALL
    + "reach('keyctl', libc.syscall(250, 0, -3, 1)); reach('add_key', libc.syscall(248, b'user', b'x', "
    "b'y', 1, -3))",
    "rings, bpf and faults": SYSCALL
    + "reach('io_uring', libc.syscall(425, 8, ctypes.create_string_buffer(120))); reach('bpf', "
    "libc.syscall(321, 0, ctypes.create_string_buffer(72), 72)); reach('userfaultfd', "
    "libc.syscall(323, 1)); reach('perf', libc.syscall(298, ctypes.create_string_buffer(120), 0, -1, "
    "-1, 0))",
    "messages and shared segments": SYSCALL
    + "reach('shmget', libc.shmget(0, 4096, 0o1600)); reach('msgget', libc.msgget(0, 0o1600)); "
    "reach('mq', libc.syscall(240, b'x', 66, 384, 0))",
    "calls of 32 bits": (
        "import ctypes, mmap, platform\nif platform.machine() == 'x86_64':\n"
        "    m = mmap.mmap(-1, 4096, prot=7)\n    m.write(bytes.fromhex('b814000000cd80c3'))\n"
        "    f = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(m)))\n"
        "    if f() > 0: print('REACHED')"
    ),
    "calls of x32": SYSCALL
    + "import platform\nif platform.machine() == 'x86_64': reach('x32', libc.syscall(0x40000000 + 39))",
    "rename the machine": "import socket\nsocket.sethostname('taken')\nprint('REACHED')",
    "set the clock": "import time\ntime.clock_settime(time.CLOCK_REALTIME, 0)\nprint('REACHED')",
    "priority": "import os\nos.nice(-10)\nprint('REACHED')",
    "the scheduler": (
        "import os\nos.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))\nprint('REACHED')"
    ),
}


def test_there_are_enough_of_them() -> None:
    assert len(ATTACKS) >= 80
    assert len(set(ATTACKS.values())) == len(ATTACKS)


@dataclass
class Outside:
    """What an attack could harm: a folder with a secret, a listening port, and this machine."""

    folder: Path
    port: int
    server: socket.socket
    before: dict[str, object] = field(default_factory=dict)

    def fill(self, program: str) -> str:
        places = {
            "@SECRET@": self.folder / "secret.txt",
            "@TARGET@": self.folder / "target",
            "@FOLDER@": self.folder,
            "@PORT@": self.port,
            "@PID@": os.getpid(),
            "@SCRATCH@": SCRATCH_BYTES,
        }
        for name, value in places.items():
            program = program.replace(name, str(value))
        return program

    def look(self) -> dict[str, object]:
        library = Path(numpy.__file__).stat()
        secret = self.folder / "secret.txt"
        return {
            "files": sorted(path.name for path in self.folder.iterdir()),
            "secret": secret.read_text() if secret.exists() else None,
            "mode of the secret": secret.stat().st_mode if secret.exists() else None,
            "mode of /dev/null": (os.stat("/dev/null").st_mode, os.stat("/dev/null").st_uid),
            "null is a device": stat.S_ISCHR(os.stat("/dev/null").st_mode),
            "numpy": (library.st_size, library.st_mtime_ns, library.st_mode),
            "host name": socket.gethostname(),
            "own group": os.getpgrp(),
            "priority": os.getpriority(os.PRIO_PROCESS, 0),
        }

    def was_called(self) -> bool:
        try:
            self.server.accept()[0].close()
        except (BlockingIOError, TimeoutError):
            return False
        return True


@pytest.fixture(scope="module", autouse=True)
def _secret_in_the_environment() -> Iterator[None]:
    """Set before a sandbox starts, so that one that hands its environment on is caught."""
    os.environ["API_KEY_OF_THE_TEST"] = ENV_SECRET
    yield
    del os.environ["API_KEY_OF_THE_TEST"]


BACKENDS: dict[str, Callable[[], Sandbox]] = {
    "monty": lambda: MontySandbox(workers=2),
    "bwrap": lambda: BubblewrapSandbox(workers=2),
}


@pytest.fixture(scope="module", params=BACKENDS)
def sandbox(request: pytest.FixtureRequest, _secret_in_the_environment: None) -> Iterator[Sandbox]:
    with BACKENDS[request.param]() as sandbox:
        sandbox.self_test()
        yield sandbox


@pytest.fixture
def outside(tmp_path: Path) -> Iterator[Outside]:
    (tmp_path / "secret.txt").write_text(FILE_SECRET)
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        outside = Outside(tmp_path, server.getsockname()[1], server)
        outside.before = outside.look()
        yield outside


@pytest.mark.parametrize("name", ATTACKS)
def test_the_harm_is_not_done(sandbox: Sandbox, outside: Outside, name: str) -> None:
    started = time.monotonic()
    with Watch() as watch:
        result = sandbox.run(outside.fill(ATTACKS[name]), LIMITS)
    took = time.monotonic() - started

    told = result.stdout + result.error
    assert FILE_SECRET not in told
    assert ENV_SECRET not in told
    assert "REACHED" not in result.stdout
    assert "forged" not in result.stdout
    assert outside.look() == outside.before
    assert not outside.was_called()
    # Far above what a loaded machine needs; without a limit most would never end.
    assert took < LIMITS.seconds + 120.0
    assert len(result.stdout.encode()) <= LIMITS.output_bytes
    assert len(result.error) < 1000
    # numpy and sympy take some of the last part.
    assert watch.most_memory < LIMITS.memory_bytes + SCRATCH_BYTES + 2**28
    assert not left_behind(sandbox)

    look = "import os\nprint(6 * 7, os.listdir('/tmp'))" if sandbox.backend == "bwrap" else "print(6 * 7)"
    after = sandbox.run(look, Limits(seconds=30.0))
    assert after.stdout.split()[0] == "42", after
    assert sandbox.backend == "monty" or after.stdout == "42 []\n"


@pytest.mark.parametrize(
    ("leaves", "looks"),
    [
        ("open('/tmp/note', 'w').write('LEFT')", "print(open('/tmp/note').read())"),
        ("import builtins\nbuiltins.len = lambda x: 'LEFT'", "print(len([]))"),
        ("import math\nmath.pi = 'LEFT'", "import math\nprint(math.pi)"),
        ("import os\nos.environ['NOTE'] = 'LEFT'", "import os\nprint(os.environ.get('NOTE'))"),
        ("import sys\nsys.modules['note'] = 'LEFT'", "import note\nprint(note)"),
        ('import json\njson.dumps = lambda *a, **k: \'{"value": "LEFT"}\'', "1"),
        ("import numpy\nnumpy.pi = 'LEFT'", "import numpy\nprint(numpy.pi)"),
        (
            "import os\nos.umask(0o777); os.chdir('/')",
            "import os\nprint('LEFT' if os.getcwd() == '/usr' else 1)",
        ),
        ("LEFT = 'LEFT'\nglobal_name = 'LEFT'", "print(global_name)"),
        ("import os\nos.symlink('/usr', '/tmp/LEFT')", "import os\nprint(os.listdir('/tmp'))"),
    ],
)
def test_a_program_finds_nothing_of_the_one_before(sandbox: Sandbox, leaves: str, looks: str) -> None:
    for _ in range(4):  # each worker gets some
        sandbox.run(leaves, Limits(seconds=30.0))
    assert "LEFT" not in sandbox.run(looks, Limits(seconds=30.0)).stdout


def test_attacks_at_once_do_not_reach_their_neighbours(sandbox: Sandbox) -> None:
    attacks = ["while True: pass", "x = 'x' * 10**10", "import os\nos.kill(-1, 9)", "print('z' * 10**7)"]
    answers: list[bool] = []

    def work(number: int) -> None:
        for step in range(6):
            sandbox.run(attacks[(number + step) % len(attacks)], Limits(seconds=0.1))
            after = sandbox.run(f"print({number} * {step})", Limits(seconds=30.0))
            answers.append(after.stdout == f"{number * step}\n")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [True] * 24


def test_the_shared_sandbox_withstands_what_monty_cannot_run(tmp_path: Path) -> None:
    """Through `auto`: an attack that needs what Monty lacks runs under bubblewrap, and fails there too."""
    (tmp_path / "secret.txt").write_text(FILE_SECRET)
    result = default_sandbox().run(
        f"import ctypes, numpy\nprint(open({str(tmp_path / 'secret.txt')!r}).read())",
        Limits(seconds=30.0),
    )
    assert result.backend == "bwrap"
    assert FILE_SECRET not in result.stdout + result.error


class Watch:
    """The most memory that any process below this one held, in bytes, looked at every 20 ms."""

    def __init__(self) -> None:
        self.most_memory = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def _look(self) -> None:
        while not self._stop.wait(0.02):
            self.most_memory = max([self.most_memory, *map(memory, descendants())])

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()


def left_behind(sandbox: Sandbox) -> list[int]:
    """The processes that are neither a worker nor what holds one, after they had a moment to end."""
    if sandbox.backend != "bwrap":
        return []
    for _ in range(1500):
        # bwrap, the first process of its namespace, the worker; a program would be the fourth.
        deep = [pid for pid, depth in _tree().items() if depth > 3]
        if not deep:
            break
        time.sleep(0.02)
    return deep


def descendants() -> list[int]:
    return list(_tree())


def _tree() -> dict[int, int]:
    """Every process below this one, and how far below."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
    depths: dict[int, int] = {}
    for pid in parents:
        depth, at = 0, pid
        while at in parents and at != os.getpid():
            at, depth = parents[at], depth + 1
        if at == os.getpid() and depth:
            depths[pid] = depth
    return depths


def memory(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0


def test_the_look_around_sees_harm(outside: Outside) -> None:
    """The checks above are worth nothing if they cannot fail."""
    (outside.folder / "target").write_text("x")
    assert outside.look() != outside.before
    with socket.create_connection(("127.0.0.1", outside.port)):
        assert outside.was_called()
    pid = os.posix_spawn("/bin/sleep", ["sleep", "60"], {})
    try:
        assert pid in descendants()
        assert _tree()[pid] == 1
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    kept: dict[str, Any] = json.loads(json.dumps(outside.before))
    assert kept["secret"] == FILE_SECRET
