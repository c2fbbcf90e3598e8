"""Ternary matrices kept as two bits a weight while text is made, and a product that reads them as they are.

`pack_model` puts a PackedLinear in the place of every matrix of a model that holds -1, 0, 1 times a scale for each
group of inputs, as the ternary format stores it. A group's scale is kept as a row of a table of the scales that occur:
they are powers of a ratio, and half floats would hold few of them. So the values are those of the artifact to the last
bit, and only the order of sums differs.

A few rows at a time go through a kernel in C, compiled once with the system's `cc` and kept in the user's cache folder
by the hash of source, compiler and processor. Where there is no compiler, on a GPU, and for many rows, a matrix is
unpacked and multiplied as any other.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import train_gpt as gpt  # noqa: E402

LANES = 16
BLOCK = 4 * LANES  # weights that share LANES bytes: byte j has those of j, j + LANES, j + 2 LANES and j + 3 LANES
FEW_ROWS = 8  # rows of x up to which the kernel is used
SMALL = 1 << 17  # weights below which one thread is quicker than waking others
FLAGS = (("-O3", "-march=native", "-fopenmp"), ("-O3", "-march=native"), ("-O3",))
COMPILE_SECONDS = 120

SOURCE = r"""
#include <stdint.h>
#include <string.h>

#define LANES 16
#define MOST 4 /* rows of x at once: more do not fit the registers */
#define UNROLL _Pragma("GCC unroll 4")

typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef int32_t whole __attribute__((vector_size(4 * LANES)));
typedef float floats __attribute__((vector_size(4 * LANES)));

/* y of one row of `row_blocks` blocks of weights, `blocks` to a group and what is left in the last, for `count` rows of
   x, `width` floats apart; those of y are `apart`. Sums run side by side in `ways`, so that few of them do not wait for
   each other. */
static inline __attribute__((always_inline)) void row_of(
    const uint8_t *bits, const uint8_t *levels, const float *table, const float *x, float *y, size_t apart,
    int row_blocks, int blocks, size_t width, const int count, const int ways)
{
  floats total[MOST] = {{0}};
  for (int left = row_blocks; left > 0; left -= blocks) {
    floats part[MOST][4] = {{{0}}};
    for (int block = 0; block < (left < blocks ? left : blocks); block++) {
      uint32_t each[LANES];
      for (int j = 0; j < LANES; j++) each[j] = (uint32_t)bits[j] << 24;
      words wide;
      memcpy(&wide, each, sizeof wide);
      UNROLL for (int plane = 0; plane < 4; plane++) {
        const floats weight = __builtin_convertvector((whole)(wide << (6 - 2 * plane)) >> 30, floats);
        UNROLL for (int t = 0; t < count; t++) {
          floats from;
          memcpy(&from, x + t * width + plane * LANES, sizeof from);
          part[t][plane % ways] += weight * from;
        }
      }
      bits += LANES;
      x += 4 * LANES;
    }
    const float scale = table[*levels++];
    UNROLL for (int t = 0; t < count; t++)
      UNROLL for (int way = 0; way < ways; way++) total[t] += scale * part[t][way];
  }
  UNROLL for (int t = 0; t < count; t++) {
    float sum = 0;
    for (int j = 0; j < LANES; j++) sum += total[t][j];
    y[t * apart] = sum;
  }
}

#define ROW(count, ways) row_of(bits + row * stride, levels + row * groups, table, x + t * 4 * stride, \
                                y + t * rows + row, rows, row_blocks, blocks, 4 * stride, count, ways)

/* bits (rows, row_blocks, LANES), levels (rows, groups), x (count, row_blocks, 4 LANES) -> y (count, rows). */
void product(const uint8_t *bits, const uint8_t *levels, const float *table, const float *x, float *y,
             int rows, int row_blocks, int blocks, int count, int threads)
{
  const size_t stride = (size_t)row_blocks * LANES, groups = (row_blocks + blocks - 1) / blocks;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int row = 0; row < rows; row++)
    for (size_t t = 0; t < (size_t)count; t += MOST)
      switch (count - t) {
        case 1: ROW(1, 4); break;
        case 2: ROW(2, 2); break;
        case 3: ROW(3, 1); break;
        default: ROW(4, 1);
      }
}
"""


class Trits(NamedTuple):
    """A ternary matrix (R, C): codes of two bits (R, W / 4) uint8, W being its groups' inputs, each group's rounded up
    to BLOCK; the groups' rows of the table (R, G) uint8; the table's scales, fp32; C; and how many inputs share a
    scale, 0 for all."""
    codes: Tensor
    levels: Tensor
    table: Tensor
    columns: int
    group: int

    @property
    def scales(self) -> Tensor:
        """The groups' scales (R, G), fp32."""
        return self.table[self.levels.long()]


def group_size(columns: int, group: int) -> int:
    """Inputs of a whole group."""
    return min(group or columns, columns)


def group_blocks(columns: int, group: int) -> int:
    """Blocks of a whole group."""
    return -(-group_size(columns, group) // BLOCK)


def row_blocks(columns: int, group: int) -> int:
    """Blocks of a row: those of its whole groups and what a ragged last one needs."""
    whole, rest = divmod(columns, group_size(columns, group))
    return whole * group_blocks(columns, group) + -(-rest // BLOCK)


def in_groups(x: Tensor, group: int) -> Tensor:
    """x (R, C) as (R, G, P), with zeros behind a ragged last group, and behind each up to whole blocks."""
    rows, columns = x.shape
    size = group_size(columns, group)
    x = F.pad(x, (0, -columns % size)) if columns % size else x
    wide = x.reshape(rows, -1, size)
    return F.pad(wide, (0, -size % BLOCK)) if size % BLOCK else wide


def in_blocks(x: Tensor, group: int) -> Tensor:
    """x (R, C) as (R, W): in_groups without the empty blocks of a ragged last group."""
    return in_groups(x, group).flatten(1)[:, :row_blocks(x.shape[1], group) * BLOCK]


def _shifts(device: torch.device) -> Tensor:
    return torch.arange(0, 8, 2, dtype=torch.uint8, device=device)[:, None]


def pack_codes(codes: Tensor, group: int) -> Tensor:
    """Codes -1, 0, 1 (R, C) int8 as numbers of two bits, the upper one the sign, (R, W / 4) uint8."""
    planes = (in_blocks(codes, group) & 3).to(torch.uint8).unflatten(1, (-1, 4, LANES))
    return (planes << _shifts(codes.device)).sum(2, dtype=torch.uint8).flatten(1)


def unpack_codes(packed: Tensor, columns: int, group: int) -> Tensor:
    """The inverse: int8 (R, C)."""
    planes = (packed.unflatten(1, (-1, 1, LANES)) >> _shifts(packed.device)) & 3
    size, wide = group_size(columns, group), group_blocks(columns, group) * BLOCK
    rows = planes.flatten(1)
    groups = F.pad(rows, (0, -rows.shape[1] % wide)).unflatten(1, (-1, wide))
    return (groups[..., :size].flatten(1)[:, :columns] ^ 2).to(torch.int8) - 2


def to_trits(weight: Tensor, group: int) -> Trits | None:
    """A matrix (R, C), fp32, in two bits a weight; None where it is not -1, 0, 1 times a scale in every group."""
    scales = in_groups(weight.abs(), group).amax(2)
    table, levels = scales.unique(return_inverse=True)  # of more than 256 some would come back as others
    trits = Trits(pack_codes(weight.sign().to(torch.int8), group), levels.to(torch.uint8), table, weight.shape[1],
                  group)
    return trits if torch.equal(weights_of(trits.codes, trits.scales, trits.columns, group), weight) else None


def weights_of(codes: Tensor, scales: Tensor, columns: int, group: int) -> Tensor:
    """The fp32 matrix (R, C) that packed codes and scales (R, G) stand for."""
    spread = scales.repeat_interleave(group_size(columns, group), 1)[:, :columns]
    return unpack_codes(codes, columns, group).float() * spread


def matvec_reference(codes: Tensor, scales: Tensor, x: Tensor, group: int) -> Tensor:
    """x (T, C) times the matrix of packed codes (R, W / 4) and scales (R, G): (T, R) in the dtype of x."""
    return F.linear(x, weights_of(codes, scales, x.shape[1], group).to(x.dtype))


class Kernel(NamedTuple):
    """product(trits, x) -> (T, R) for few rows, None where there is none, and a line that says which or why not."""
    product: Callable[[Trits, Tensor], Tensor] | None
    line: str


def _processor() -> str:
    """What tells processors apart that run different machine code."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
    return f"{platform.machine()} {platform.processor()}"


def compile_kernel(folder: Path, compiler: str | None) -> Kernel:
    """The kernel, compiled into the folder unless it is there."""
    if compiler is None:
        return Kernel(None, "packed: no C compiler (cc) on the PATH, matrices are unpacked for every product")
    try:
        told = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=COMPILE_SECONDS)
        parts = [SOURCE, str(FLAGS), compiler, told.stdout, _processor()]
        key = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
        path = folder / f"packed_{key}.so"
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            _compile(compiler, path)
        function = ctypes.CDLL(str(path)).product
    except (OSError, AttributeError, subprocess.TimeoutExpired, ValueError) as error:
        return Kernel(None, f"packed: {compiler} gave no kernel ({' '.join(str(error).split())[:160]}), matrices are "
                            "unpacked for every product")
    function.argtypes, function.restype = [ctypes.c_void_p] * 5 + [ctypes.c_int] * 5, None
    return Kernel(functools.partial(_product, function), f"packed: kernel of {compiler}, {path}")


def _compile(compiler: str, path: Path) -> None:
    """The shared object at `path`, whole or not at all; ValueError with what the compiler said."""
    with tempfile.TemporaryDirectory(dir=path.parent) as place:
        source, out = Path(place) / "packed.c", Path(place) / "packed.so"
        source.write_text(SOURCE)
        for flags in FLAGS:
            done = subprocess.run([compiler, *flags, "-shared", "-fPIC", "-o", str(out), str(source)],
                                  capture_output=True, text=True, timeout=COMPILE_SECONDS)
            if done.returncode == 0:
                os.replace(out, path)
                return
        raise ValueError((done.stderr.strip() or "no message").splitlines()[-1])


def _product(function: Callable[..., None], trits: Trits, x: Tensor) -> Tensor:
    """x (T, C) times the matrix, (T, R) in the dtype of x, by the compiled function."""
    rows, wide = trits.codes.shape
    # Weights are cast to the dtype of x everywhere else, too.
    table = trits.table if x.dtype == torch.float32 else trits.table.to(x.dtype).float()
    spread = in_blocks(x.float(), trits.group).contiguous()
    y = torch.empty(len(x), rows)
    threads = 1 if rows * trits.columns < SMALL else torch.get_num_threads()
    function(trits.codes.data_ptr(), trits.levels.data_ptr(), table.data_ptr(), spread.data_ptr(), y.data_ptr(), rows,
             wide // LANES, group_blocks(trits.columns, trits.group), len(x), threads)
    return y.to(x.dtype)


@functools.cache
def load_kernel() -> Kernel:
    """The kernel of this machine."""
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError as error:
        return Kernel(None, f"packed: no place for a kernel ({error}), matrices are unpacked for every product")
    return compile_kernel(cache / "sixteen", shutil.which("cc") or shutil.which("gcc") or shutil.which("clang"))


class PackedLinear(nn.Module):
    """A train_gpt.Linear whose matrix is held as Trits."""

    def __init__(self, linear: gpt.Linear, trits: Trits, kernel: Kernel) -> None:
        super().__init__()
        self.rounds, self.path, self.kernel = linear.rounds, linear.path, kernel
        self.columns, self.group = trits.columns, trits.group
        for name in ("codes", "levels", "table"):
            self.register_buffer(name, getattr(trits, name).to(linear.weight.device))

    @property
    def trits(self) -> Trits:
        """The matrix as it is held."""
        return Trits(self.codes, self.levels, self.table, self.columns, self.group)

    @property
    def weight(self) -> Tensor:
        """The matrix (out, in), fp32, unpacked anew: for what multiplies it by itself."""
        return weights_of(self.codes, self.trits.scales, self.columns, self.group)

    def product(self, x: Tensor) -> Tensor:
        """x (..., in) times the matrix, (..., out)."""
        if self.kernel.product is None or x.device.type != "cpu" or x.numel() > FEW_ROWS * self.columns:
            return matvec_reference(self.codes, self.trits.scales, x.flatten(0, -2), self.group).unflatten(
                0, x.shape[:-1])
        return self.kernel.product(self.trits, x.flatten(0, -2)).unflatten(0, x.shape[:-1])

    def forward(self, x: Tensor, site: str, deltas: gpt.Deltas | None) -> Tensor:
        """(..., in) -> (..., out)."""
        x = gpt.round_tokens(x) if self.rounds else x
        y = self.product(x)
        return gpt.add_delta(y if self.path is None else y + self.path(x), x, site, deltas)


def pack_linear(linear: gpt.Linear, weight: Tensor, group: int, kernel: Kernel | None = None) -> PackedLinear | None:
    """The same matrix, packed, from its stored weight (out, in); None where that is not ternary in these groups."""
    trits = to_trits(weight.float(), group)
    return None if trits is None else PackedLinear(linear, trits, kernel or load_kernel())


class Packed(NamedTuple):
    """What pack_model did: names of the packed matrices, their bytes, what they would take in bf16, the line of the
    kernel, and the matrices with a ternary route that stayed as they are."""
    names: tuple[str, ...]
    bytes: int
    plain_bytes: int
    line: str
    left: tuple[str, ...]

    @property
    def share(self) -> float:
        """Their bytes over those of bf16; 0 where nothing was packed."""
        return self.bytes / self.plain_bytes if self.plain_bytes else 0.0


def pack_model(model: gpt.GPT, routes: Mapping[str, gpt.Route], weights: Mapping[str, Tensor],
               kernel: Kernel | None = None) -> Packed:
    """Put a PackedLinear in the place of every Linear with a ternary route. Experts multiply several matrices at once
    and unpack them for that."""
    kernel, packed, left = kernel or load_kernel(), {}, []
    for name, module in list(model.named_modules()):
        if isinstance(module, gpt.Linear) and routes[f"{name}.weight"].format == "ternary":
            made = pack_linear(module, weights[f"{name}.weight"], routes[f"{name}.weight"].group, kernel)
            if made is None:
                left.append(name)
            else:
                packed[name] = made
    for name, made in packed.items():
        model.set_submodule(name, made)
    for module in model.modules():
        if isinstance(module, gpt.FeedForward) and PackedLinear in (type(module.up), type(module.down)):
            module.fused = None
    return Packed(tuple(packed), sum(buffer.numel() * buffer.element_size() for made in packed.values()
                                     for buffer in made.buffers(recurse=False)),
                  sum(2 * made.codes.shape[0] * made.columns for made in packed.values()), kernel.line, tuple(left))
