"""A wrong clock for chosen processes: their wall clock is the machine's and so many seconds more.

A small library is compiled with the machine's C compiler and loaded before libc, so that Python and
Valkey alike read the wrong time; clocks that only measure time passing stay as they are. The
seconds lie in a file that all of them map, and may be changed while they run.
"""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path
from typing import Final

_SOURCE: Final = r"""
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>
static volatile int64_t none, *skew = &none;
__attribute__((constructor)) static void map(void) {
  const char *path = getenv("SKEWED_CLOCK");
  int file = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
  if (file < 0) return;
  void *at = mmap(0, sizeof *skew, PROT_READ, MAP_SHARED, file, 0);
  if (at != MAP_FAILED) skew = at;
  close(file);
}
int clock_gettime(clockid_t which, struct timespec *now) {
  int failed = (int)syscall(SYS_clock_gettime, which, now);
  if (!failed && (which == CLOCK_REALTIME || which == CLOCK_REALTIME_COARSE)) now->tv_sec += *skew;
  return failed;
}
int gettimeofday(struct timeval *restrict now, void *restrict zone) {
  struct timespec read;
  (void)zone;
  clock_gettime(CLOCK_REALTIME, &read);
  now->tv_sec = read.tv_sec;
  now->tv_usec = read.tv_nsec / 1000;
  return 0;
}
time_t time(time_t *out) {
  struct timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  if (out) *out = now.tv_sec;
  return now.tv_sec;
}
"""


class SkewedClock:
    """The clock of the processes that are started with its ``environment``."""

    def __init__(self, directory: Path) -> None:
        compiler = shutil.which("cc")
        if compiler is None:
            raise FileNotFoundError("no C compiler (cc) to make a wrong clock with")
        source, library = directory / "skew.c", directory / "skew.so"
        self._file = directory / "skew"
        self.set(0)
        source.write_text(_SOURCE)
        subprocess.run(  # noqa: S603 - our own source
            [compiler, "-shared", "-fPIC", "-O2", "-o", library, source], check=True
        )
        self.environment = {"LD_PRELOAD": str(library), "SKEWED_CLOCK": str(self._file)}

    def set(self, seconds: int) -> None:
        """From now on the clock is so many seconds ahead; behind where they are negative."""
        with self._file.open("r+b" if self._file.exists() else "wb") as file:
            file.write(struct.pack("=q", seconds))
