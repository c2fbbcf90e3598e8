"""Paired comparison: variants trained on equal seconds, data and seeds, and what their differences say.

`./run.sh bench presets` compares systems whose shapes one rule makes equal in artifact bytes; `./run.sh bench parts`
compares a system with changes of it, rows of ROWS or of your own. So do `./run.sh bench crawler` with the crawler, its
loops and what could stand in attention's place, rows of CRAWLER_ROWS, `./run.sh bench ternary` with one ternary block,
its squeeze and its optimizers, rows of TERNARY_ROWS, and `./run.sh bench hybrid` with mixers, loops, experts and
in-place learning of the hybrid stack, rows of HYBRID_ROWS. tools/bench.py has their options and prints their tables.

A variant is words for train_gpt.py. Runs are launches of ./run.sh, as a user's are, and go seed by seed through all
variants: what drifts on a shared machine then meets all of them, and the differences are taken within a seed. A run is
kept in runs/compare/<digest>/<variant>_<seed>; the digest is made of the packed program, the settings and the dataset's
manifest. One that is finished is used again, so a command that was killed goes on, and a row that is added later
costs its own runs only.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import train_gpt as gpt  # noqa: E402

Fields = tuple[str, dict[str, str], list[list[Any]], str]  # of a bench.Table: title, columns with formats, rows, note
Results = dict[tuple[str, int], dict[str, Any]]  # (variant, seed) -> result.json

# What the engine says itself, so no word and no row may: seeds, places, and what is made equal.
FIXED = {"PRESET": "PRESETS or BASE", "SEED": "SEEDS", "MAX_WALLCLOCK_SECONDS": "SECONDS", "TARGET_BYTES": "BYTES",
         "EVAL": "the option EVAL", **dict.fromkeys(
             ("EVAL_BUDGET_SECONDS", "RUN_ID", "RUNS_PATH", "FROM", "STAGES", "PACK"), "the comparison")}
SHAPED = dict.fromkeys(("MODEL_DIM", "NUM_HEADS", "NUM_KV_HEADS"), "the rule of BYTES")
LAST_LINES = 3

# Rows of `parts`: a name and the words that it changes; `again` changes nothing and shows the noise of the machine.
ROWS: dict[str, list[str]] = {
    "again": [],
    "no-smear": ["SMEAR_GATE_ENABLED=0"],
    "no-bigram": ["BIGRAM_VOCAB_SIZE=0"],
    "trigram": ["TRIGRAM=1"],
    "full-context": ["TRAIN_SEQ_SCHEDULE="],
    "q-gain-5": ["QK_GAIN_INIT=5.25"],
    "exclusive": ["XSA_LAST_N=4"],
    "sparse-gate": ["ATTN_GATE=sparse", "SPARSE_ATTN_GATE_SCALE=0.5"],
    "dense-gate": ["ATTN_GATE=dense"],
    "output-gate": ["ATTN_GATE=output"],
    "ln-scale": ["LN_SCALE=1"],
    "lanes": ["PARALLEL_START_LAYER=3"],
    "loop": ["STACK=A (A)*2@0.35 A2"],
    "value-residual": ["VALUE_RESIDUAL=1"],
    "value-embeddings": ["VE_LAYERS=2,3", "VE_DIM=64"],
    "factored": ["EMBED_DIM=96"],
    "asymmetric-cap": ["ASYM_LOGIT_RESCALE=1"],
    "decay-taper": ["MUON_WD=0.1", "WD_TAPER_START_FRAC=0.7", "WD_TAPER_FINAL_MULT=0.5"],
    "caseops-tokens": ["DATA_PATH=./data/datasets/wikitext2_caseops2048"],
    "no-skips": ["UNET_SKIPS=0"],
    "plain-skips": ["SKIP_GATES_ENABLED=0"],
    "newton-schulz": ["MUON_BACKEND=newton_schulz"],
    "no-row-normalize": ["MUON_ROW_NORMALIZE=0"],
    "squared-relu": ["MLP_SLOPE=0"],
    "rotate-all": ["ROPE_DIMS=0"],
    "uniform-init": ["MATRIX_INIT=uniform"],
    "no-allocation": ["ALLOCATE=0"],
    "adamw": ["MATRIX_OPTIMIZER=adamw", "MATRIX_LR=0.004"],
    "fro": ["MATRIX_OPTIMIZER=fro", "OTHER_OPTIMIZER=fro", "MATRIX_LR=0.002", "TIED_EMBED_LR=0.01", "SCALAR_LR=0.01"],
    "fro2": ["MATRIX_OPTIMIZER=fro2", "FRO_ALPHA=0.3", "FRO_GAMMA=1"],
}

# Rows of `crawler`: passes of the shared block, what tells them apart, the delta memory, training for the squeeze of
# shared weights; then stacks that take the base's bytes in another way, as wide as those allow (OWN_SHAPE).
SHARED = "A{mlp=4,xsa=1}"
CRAWLER_ROWS: dict[str, list[str]] = {
    "again": [],
    "one-pass": [f"STACK=A ({SHARED})*1 A", "LOOP_INSTRUCTIONS=none", "LOOP_AWARE_GPTQ=0"],
    "two-passes": [f"STACK=A ({SHARED})*2 A"],
    "eight-passes": [f"STACK=A ({SHARED})*8 A"],
    "no-instructions": ["LOOP_INSTRUCTIONS=none"],
    "static": ["LOOP_INSTRUCTIONS=static"],
    "position": ["LOOP_INSTRUCTIONS=position"],
    "delta-memory": [f"STACK=A ({SHARED} D{{mlp=0,gate=0}})*4 A"],
    "tap": ["CRAWLER_TAP_DIM=32"],
    "anchor": ["ANCHOR_DIM=32"],
    "rope-scales": ["CRAWLER_LOOP_ROPE_SCALES=9,3,1,1"],
    "cadence": ["CRAWLER_CADENCE_EARLY=2", "CRAWLER_CADENCE_MAIN=4", "CRAWLER_CADENCE_LATE=6"],
    "noise": ["QAT_START=0.5", "QAT_KIND=noise", "QAT_PARTS=loops"],
    "straight-through": ["QAT_START=0.5", "QAT_PARTS=loops"],
    "flat": ["STACK=A6", "LOOP_INSTRUCTIONS=none", "LOOP_AWARE_GPTQ=0", "POLICY="],
    **{name: [f"STACK={letter} ({letter}{{mlp=4}})*4 {letter}"] for name, letter in
       (("delta", "D"), ("gated-delta", "G"), ("mlstm", "X"), ("titans", "T"))},
}
OWN_SHAPE = frozenset({"flat", "delta", "gated-delta", "mlstm", "titans"})

# Rows of `ternary`, changes of a ternary block with the placed form of CAGS and the rate term: these, the update, scale
# and threshold, other formats of a bit or two, what tells places apart, and passes. The rates are the best of a sweep
# on one seed (records/LOG.md).
PLAIN = ["CAGS=none", "RATE_TERM=0"]
TERNARY_ROWS: dict[str, list[str]] = {
    "again": [],
    "plain": PLAIN,
    "cags-published": ["CAGS=published", "RATE_TERM=0"],
    "cags-placed": ["RATE_TERM=0"],
    "rate-term": ["CAGS=none"],
    "rate-term-4": ["CAGS=none", "RATE_TERM=4"],
    "adamw": ["MATRIX_OPTIMIZER=adamw", "MATRIX_LR=0.0015"],
    "fro": ["MATRIX_OPTIMIZER=fro", "MATRIX_LR=0.004"],
    "fro2": ["MATRIX_OPTIMIZER=fro2", "FRO_ALPHA=0.3", "FRO_GAMMA=1"],
    "mezo": ["MATRIX_OPTIMIZER=mezo", "OTHER_OPTIMIZER=mezo", "MATRIX_LR=0.1", "TIED_EMBED_LR=0.1", "SCALAR_LR=0.01"],
    "rms": ["TERNARY_SCALE=rms"],
    "nonzero": ["TERNARY_SCALE=nonzero"],
    "threshold": ["TERNARY_SCALE=nonzero", "TERNARY_TAU=0.767"],
    "binary": ["MATRIX_FORMAT=binary", *PLAIN],
    "sherry": ["MATRIX_FORMAT=sherry", *PLAIN],
    "low-rank": ["HGF_RANK=8"],
    "radial": ["POSITIONS=radial"],
    "radial-smooth": ["POSITIONS=radial_smooth"],
    "rotary": ["POSITIONS=none", "ROPE_DIMS=0"],
    "passes-31": ["STACK=(A)*31"],
    "passes-2": ["STACK=(A)*2"],
    "distinct-8": ["STACK=A8", "PASS_DROP=0"],
    "distinct-2": ["STACK=A2", "PASS_DROP=0"],
}
TERNARY_OWN_SHAPE = frozenset({"binary", "sherry", "low-rank", "distinct-8", "distinct-2"})

# Rows of `hybrid`, changes of the hybrid stack whose middle is passed one to four times, drawn for each row: mixers,
# fixed passes, what a pass begins with, experts, in-place learning, what is open as a bias, a span knot, context that
# grows.
HYBRID_ROWS: dict[str, list[str]] = {
    "again": [],
    "attention": ["STACK=A (A2)*1..4~2 A", "MIXER_CHUNK=64"],
    "recurrent": ["STACK=G (X G)*1..4~2 G"],
    "titans": ["STACK=G (T A)*1..4~2 A"],
    "loop-1": ["STACK=G X A2", "LOOP_STATE=none"],
    "loop-2": ["STACK=G (X A)*2 A"],
    "loop-4": ["STACK=G (X A)*4 A"],
    "distinct": ["STACK=G [X A]2 A", "LOOP_STATE=none"],
    "no-state": ["STACK=G (X A)*2 A", "LOOP_STATE=none"],
    "euler": ["LOOP_STATE=euler"],
    "experts": ["MOE_EXPERTS=4"],
    "experts-2-of-8": ["MOE_EXPERTS=8", "MOE_TOPK=2"],
    "in-place": ["INPLACE_LAYERS=3", "INPLACE_CHUNK=32"],
    "in-place-3": ["INPLACE_LAYERS=3", "INPLACE_CHUNK=32", "INPLACE_LR=3"],
    "retrieval": ["RETRIEVAL_BITS=64"],
    "grammar": ["GRAMMAR_BIAS=1"],
    "knot": ["STACK=K (X A)*1..4~2 A"],
    "eight-bits": ["ACT_INT8=1"],
    "no-extra-norms": ["EXTRA_NORMS=0"],
    "short-context": ["TRAIN_SEQ_SCHEDULE=128@0.5,256@1"],
}
HYBRID_OWN_SHAPE = frozenset({"attention", "recurrent", "titans", "distinct", "knot"})


# ---- statistics


def t_quantile(freedom: int, share: float = 0.95) -> float:
    """The t that Student's t with so many degrees of freedom exceeds in magnitude with probability 1 - share.

    The distribution has a closed form for whole degrees of freedom (Abramowitz and Stegun 26.7.3 and 26.7.4), an angle
    that rises with t; the angle is bisected.
    """

    def within(angle: float) -> float:
        cosine, sine, odd, total = math.cos(angle), math.sin(angle), freedom % 2, 0.0
        term = cosine if odd else 1.0
        for power in range(1 + odd, freedom, 2):
            total += term
            term *= cosine ** 2 * power / (power + 1)
        return 2 / math.pi * (angle + sine * total) if odd else sine * total

    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if within(middle) < share else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


class Interval(NamedTuple):
    """A mean over so many seeds, the sample standard deviation, the half width of the 95 % t-interval; None is
    unknown."""
    mean: float | None
    deviation: float | None
    half: float | None
    count: int

    @property
    def verdict(self) -> str:
        """Of a difference in bits: better or worse where the whole interval is."""
        if self.half is None or abs(self.mean) <= self.half:
            return "not decided"
        return "better" if self.mean < 0 else "worse"


def interval(values: Iterable[float]) -> Interval:
    """Mean, deviation and interval of independent values."""
    values = list(values)
    if len(values) < 2:
        return Interval(values[0] if values else None, None, None, len(values))
    deviation = statistics.stdev(values)
    half = t_quantile(len(values) - 1) * deviation / math.sqrt(len(values))
    return Interval(statistics.fmean(values), deviation, half, len(values))


def paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Interval:
    """The interval of ours minus theirs over the seeds that both have."""
    return interval(ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys()))


# ---- the shape rule

LEAST_PART, WIDTH_STEP, MOST_WIDTH = 48, 8, 8192


def shape_rule(size: int, fit_bits: float) -> str:
    """The rule in words."""
    return (f"MODEL_DIM is the largest multiple of {WIDTH_STEP} whose forecast artifact, code included, is at most "
            f"{size:,} bytes in the preset's own formats (where FIT chooses the steps: at {fit_bits:g} bits a weight, "
            f"with those bytes as TARGET_BYTES); NUM_HEADS the most that divide it into even parts of at least "
            f"{LEAST_PART} channels; NUM_KV_HEADS=1")


def shape_words(width: int) -> list[str]:
    """A width that is a multiple of WIDTH_STEP, and the heads that the rule gives it."""
    heads = max(heads for heads in range(1, width // LEAST_PART + 1) if width % (2 * heads) == 0)
    return [f"MODEL_DIM={width}", f"NUM_HEADS={heads}", "NUM_KV_HEADS=1"]


def rule_bytes(config: gpt.Config, code_bytes: int, fit_bits: float) -> float:
    """Bytes of code and model that the rule counts."""
    model = gpt.make_skeleton(config)
    if config.artifact.fit:
        return sum(gpt.count_roles(model).values()) * fit_bits / 8 + code_bytes
    return sum(gpt.forecast_bytes(model, gpt.routes_of(model, config.artifact)).values()) + code_bytes


def find_shape(words: list[str], env: Mapping[str, str], code_bytes: int, size: int, fit_bits: float) -> list[str]:
    """The words of the widest shape within `size` bytes; a width that the preset cannot have is passed over.
    ConfigError where none is within."""
    found, refused = None, None
    for width in range(LEAST_PART, MOST_WIDTH, WIDTH_STEP):
        try:
            config = gpt.load_config([*words, *shape_words(width)], env)
        except gpt.ConfigError as error:
            refused = refused or error
            continue
        if rule_bytes(config, code_bytes, fit_bits) > size:
            break
        found = width
    if found is None:
        why = str(refused).splitlines()[0] if refused else f"MODEL_DIM={LEAST_PART} is forecast to be larger"
        raise gpt.ConfigError(f"BYTES={size}: no width is within it for {' '.join(words[:2])}: {why}")
    return shape_words(found)


# ---- variants and their runs


class Lab(NamedTuple):
    """What the engine does to the world around it; a test brings another one."""
    ensure: Callable[[list[str]], None]  # the data for these words, or ConfigError
    pack: Callable[[gpt.Config], bytes]
    launch: Callable[[list[str], Path], list[str]]  # words, file of the output; returns a failure's last lines
    runs: Path
    env: Mapping[str, str]
    clock: Callable[[], float]
    source: Callable[[], str]  # digest of the readable train_gpt.py as it is now


class Variant(NamedTuple):
    """A row of a comparison: its name, its words without the seed, its settings, its packed program's bytes and digest,
    its folder."""
    name: str
    words: list[str]
    config: gpt.Config
    code_bytes: int
    program: str
    folder: Path

    def place(self, seed: int) -> Path:
        """The run folder."""
        return self.folder / f"{self.name}_{seed}"

    def job(self, seed: int) -> list[str]:
        """The words of one run."""
        return [*self.words, f"SEED={seed}", f"RUNS_PATH={self.folder}", f"RUN_ID={self.place(seed).name}"]

    def found(self, seed: int, env: Mapping[str, str]) -> dict[str, Any]:
        """result.json of the run if it is finished, with these settings and by this program, else {}."""
        try:
            result = json.loads((self.place(seed) / "result.json").read_text())
            program = program_digest((self.place(seed) / "train_gpt.py").read_bytes())
        except (OSError, ValueError):
            return {}
        same = (result.get("config_hash"), program) == (gpt.load_config(self.job(seed), env).digest(), self.program)
        return result if same and {*self.config.eval.eval} <= {*result.get("scores", {})} else {}


def program_digest(packed: bytes) -> str:
    """sha256 of a packed file but for its first line, which says where it came from: a commit or a comment that leaves
    the program as it is keeps the runs."""
    return hashlib.sha256(packed.partition(b"\n")[2]).hexdigest()


def ensure_data(words: list[str]) -> None:
    """Prepares the dataset that these words read."""
    done = subprocess.run([sys.executable, str(ROOT / "data" / "prepare.py"), "ensure", *words], cwd=ROOT,
                          stdout=sys.stderr, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise gpt.ConfigError(done.stderr.strip() or f"data/prepare.py ensure: exit code {done.returncode}")


def pack(config: gpt.Config) -> bytes:
    """The packed file of a configuration."""
    return gpt.pack_self(gpt.with_settings(config, {"TOOLS_PATH": str(ROOT / "tools")}))


def launch(words: list[str], out: Path) -> list[str]:
    """Runs ./run.sh, what it says goes to `out`; returns the last lines of one that failed. The lock is the run's own:
    it inherits it, so one that outlived a killed command is waited for, never run twice at a time."""
    # bench.py sets the first for its own numbers; a user's run has it as torch and numpy want it.
    env = {name: value for name, value in os.environ.items() if name != "OPENBLAS_NUM_THREADS"}
    with out.with_suffix(".lock").open("a") as lock, out.open("ab") as said:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{out.stem}: a run of an earlier command is still at it; waiting for its end", file=sys.stderr,
                  flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        done = subprocess.run([str(ROOT / "run.sh"), *words], cwd=ROOT, stdout=said, stderr=subprocess.STDOUT,
                              env={**env, "PYTHON": sys.executable, "PACK": "1"}, pass_fds=[lock.fileno()])
    if not done.returncode:
        return []
    lines = [line for line in out.read_text(errors="replace").splitlines() if line.strip()]
    return [f"exit code {done.returncode}: {out} ends with:", *(f"  {line}" for line in lines[-LAST_LINES:])]


LAB = Lab(ensure_data, pack, launch, ROOT / "runs" / "compare", os.environ, time.monotonic,
          lambda: gpt.sha256_file(gpt.__file__))


def check_words(words: Iterable[str], fixed: Mapping[str, str]) -> None:
    """ConfigError for a word that says what the comparison says itself."""
    for word in words:
        if (name := word.partition("=")[0]) in fixed:
            raise gpt.ConfigError(f"{word}: must be left to {fixed[name]}")


def make_variant(name: str, words: list[str], options: Mapping[str, Any], lab: Lab,
                 shape: Iterable[str] | None = None) -> Variant:
    """The variant of these words under the options; its data are there afterwards. `shape` are the words of a shape,
    None finds it by the rule."""
    words = [*words, f"MAX_WALLCLOCK_SECONDS={options['SECONDS']}", f"EVAL={','.join(options['EVAL'])}",
             "EVAL_BUDGET_SECONDS=0"]
    config = gpt.load_config(words, lab.env)
    if config.artifact.fit:
        words.append(f"TARGET_BYTES={options['BYTES']}")
        config = gpt.load_config(words, lab.env)
    if shape is None:
        shape = find_shape(words, lab.env, len(lab.pack(config)), options["BYTES"], options["FIT_BITS"])
    # The shape comes after preset and overlay, the first two words, and before what a row changes of it.
    words = [*words[:2], *shape, *words[2:]]
    config = gpt.load_config(words, lab.env)
    gpt.check_squeeze(config)
    lab.ensure(words)
    packed, manifest = lab.pack(config), ROOT / config.data.data_path / "manifest.json"
    program = program_digest(packed)
    facts = {"program": program, "manifest": gpt.sha256_file(manifest) if manifest.exists() else "",
             "settings": {name: value for name, value in config.flat().items()
                          if name not in ("SEED", "RUN_ID", "RUNS_PATH")}}
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]
    return Variant(name, words, config, len(packed), program, lab.runs / digest)


class Course(NamedTuple):
    """What came of the runs: results, the lines about those that failed, how many were there before, minutes spent."""
    results: Results
    faults: list[str]
    reused: int
    minutes: float

    def values(self, name: str, kind: str) -> dict[int, float]:
        """Seed -> bits per byte of a variant by an evaluator."""
        return {seed: result["scores"][kind]["val_bpb"] for (variant, seed), result in self.results.items()
                if variant == name}


def run_all(variants: list[Variant], seeds: list[int], minutes: float, source: str, lab: Lab) -> Course:
    """Runs what is not finished, seed by seed through all variants; a line on standard error for each run. No run is
    begun that would, as long as the longest so far, end after `minutes`, nor any once train_gpt.py is not the `source`
    that the variants were made with. Raises ConfigError when interrupted."""
    results, faults, reused, began, longest = {}, [], 0, lab.clock(), 0.0
    jobs = [(variant, seed) for seed in seeds for variant in variants]
    left = sum(not variant.found(seed, lab.env) for variant, seed in jobs)
    for number, (variant, seed) in enumerate(jobs, 1):
        said = f"{number}/{len(jobs)} {variant.name} seed {seed}: "
        result, lines = variant.found(seed, lab.env), []
        if result:
            reused, said = reused + 1, said + "there already"
        else:
            before = lab.clock()
            if lab.source() != source:
                faults.append(f"train_gpt.py: changed since the command began; {left} runs are left for a new one")
                break
            if before - began + longest > 60 * minutes:
                faults.append(f"MINUTES={minutes:g}: {left} runs are left; the same command goes on with them")
                break
            left -= 1
            variant.folder.mkdir(parents=True, exist_ok=True)
            try:
                lines = lab.launch(variant.job(seed), variant.folder / f"{variant.name}_{seed}.out")
            except KeyboardInterrupt:
                raise gpt.ConfigError(f"interrupted in {variant.place(seed)}: the same command goes on there") from None
            seconds = lab.clock() - before
            longest, said = max(longest, seconds), said + f"{seconds:.0f} s"
            result = variant.found(seed, lab.env)
            if not result:
                first, *rest = lines or ["exit code 0, but no whole result.json of this program"]
                faults += [f"{variant.name} seed {seed}: {first}", *rest]
                said += ", FAILED"
        if result:
            results[variant.name, seed] = result
            said += "".join(f", {kind} {result['scores'][kind]['val_bpb']:.4f}" for kind in variant.config.eval.eval)
        print(said + (f"; at most {left * longest / 60:.0f} minutes left" if left and longest else ""),
              file=sys.stderr, flush=True)
    # Those that were there when their turn came may have been run by an earlier call or by one beside this.
    return Course(results, faults, reused, (lab.clock() - began) / 60)


# ---- tables


def same_documents(datasets: list[dict[str, Any]]) -> bool:
    """Whether datasets, as result.json has them, hold the same documents, whatever their tokenizers: numbers and bytes,
    and where all have hashed the documents' bytes (not their tokens), the digests."""
    proofs = [data["disjoint"] for data in datasets]
    names = ["train_documents", "val_documents"]
    if all(proof["method"].endswith("bytes") for proof in proofs):
        names += ["train_digest", "val_digest"]
    return len({(data["val_document_bytes"], *(data["disjoint"][name] for name in names)) for data in datasets}) <= 1


def remarks(course: Course, options: Mapping[str, Any], variants: list[Variant]) -> str:
    """What a reader of the numbers must know, a sentence each: what was not equal comes first."""
    lines, results = [], course.results
    if not same_documents([result["data"] for result in results.values()]):
        lines.append("NOT THE SAME DOCUMENTS: " + ", ".join(sorted({result["data"]["path"]
                                                                    for result in results.values()})))
    for variant in variants:
        mine = [result for (name, _), result in results.items() if name == variant.name]
        over = max((result["artifact"]["total_bytes"] for result in mine), default=0)
        if over > options["BYTES"]:
            lines.append(f"{variant.name}: {over / options['BYTES'] - 1:+.2%} over BYTES")
        spent = max((result["budget"]["train_seconds"] for result in mine), default=0.0)
        if spent > 1.005 * options["SECONDS"]:
            lines.append(f"{variant.name}: trained for {spent:.1f} seconds")
        modes = {mode: None for result in mine for mode in result["declared"]["modes"]}
        lines += [f"{variant.name} declares {mode}" for mode in modes]
    machines = {(facts["cpu"], facts["threads"], facts["torch"])
                for facts in (result["environment"] for result in results.values())}
    lines.append("; ".join("{}, {} threads, torch {}".format(*facts) for facts in sorted(machines))
                 or "no run is finished")
    if commits := sorted({result["commit"][:12] + "+" * result["commit"].endswith("+")
                          for result in results.values()}):
        lines.append(f"commit {', '.join(commits)}")
    lines.append(f"{len(results) - course.reused} runs in {course.minutes:.0f} minutes, {course.reused} were there "
                 "already")
    if course.faults:
        lines.append(f"NOT ALL: {len(variants) * len(options['SEEDS']) - len(results)} runs are missing")
    return "; ".join(lines)


def shape_fields(variants: list[Variant], title: str, fit_bits: float) -> Fields:
    """What each variant's shape comes to."""
    rows = []
    for variant in variants:
        model, config = gpt.make_skeleton(variant.config), variant.config
        fitted = gpt.forecast_fitted(model, config.artifact, variant.code_bytes)
        rows.append([variant.name, config.model.model_dim, config.model.num_heads, config.model.num_kv_heads,
                     sum(gpt.count_roles(model).values()), config.data.vocab_size, variant.code_bytes,
                     rule_bytes(config, variant.code_bytes, fit_bits), sum(fitted.values()) + variant.code_bytes])
    return (title, {"variant": "", "MODEL_DIM": "d", "NUM_HEADS": "d", "NUM_KV_HEADS": "d", "parameters": ",d",
                    "vocabulary": ",d", "code": ",d", "bytes by the rule": ",.0f", "as --plan forecasts": ",.0f"},
            rows, "")


FACTS: dict[str, tuple[str, Callable[[dict[str, Any]], float]]] = {  # column -> format, where result.json has it
    "artifact bytes": (",.0f", lambda result: result["artifact"]["total_bytes"]),
    "steps": (",.0f", lambda result: result["train"]["steps"]),
    "tokens/s": (",.0f", lambda result: result["train"]["tokens_per_second"]),
    "train s": (".1f", lambda result: result["budget"]["train_seconds"])}


def run_fields(course: Course, variants: list[Variant], kinds: list[str], seeds: list[int], title: str,
              note: str) -> Fields:
    """A row a run, and one with the means of each variant; nothing where a run failed."""
    rows = []
    for variant in variants:
        whole = []
        for seed in seeds:
            cells: list[Any] = [None] * (len(kinds) + len(FACTS))
            if result := course.results.get((variant.name, seed)):
                cells = [*(result["scores"][kind]["val_bpb"] for kind in kinds),
                         *(float(read(result)) for _, read in FACTS.values())]
                whole.append(cells)
            rows.append([variant.name, str(seed), *cells, f"{variant.folder.name}/{variant.place(seed).name}"])
        means = [statistics.fmean(column) for column in zip(*whole, strict=True)] or cells
        rows.append([variant.name, f"mean of {len(whole)}", *means, ""])
    return title, {"variant": "", "seed": "", **dict.fromkeys(kinds, ".4f"),
                   **{name: form for name, (form, _) in FACTS.items()}, "run": ""}, rows, note


INTERVALS = ("negative is better; 95 % t-intervals over paired seeds, each by itself: of twenty that show chance "
             "alone, one is decided")


def presets(options: Mapping[str, Any], lab: Lab = LAB) -> Iterator[Fields]:
    """Shapes, runs, and the differences of BASE to the other presets."""
    names, kinds, seeds = options["PRESETS"], options["EVAL"], options["SEEDS"]
    usual, source = gpt.SETTINGS["PRESET"][1].default, lab.source()
    base = options["BASE"] or (usual if usual in names else names[-1])
    if base not in names:
        raise gpt.ConfigError(f"BASE={base}: must be one of PRESETS={','.join(names)}")
    check_words(options["words"], FIXED | SHAPED)
    variants = [make_variant(name, [f"PRESET={name}", *overlay_first(options["words"])], options, lab)
                for name in names]
    yield shape_fields(variants, f"Shapes: {shape_rule(options['BYTES'], options['FIT_BITS'])}", options["FIT_BITS"])
    course = run_all(variants, seeds, options["MINUTES"], source, lab)
    yield run_fields(course, variants, kinds, seeds, f"Presets on equal terms: bits per byte, {options['SECONDS']} "
                    f"seconds of training, {options['BYTES']:,} bytes, the same documents and seeds",
                    remarks(course, options, variants))
    rows = []
    for other in (name for name in names if name != base):
        for kind in kinds:
            found = paired(course.values(base, kind), course.values(other, kind))
            rows.append([other, kind, found.mean, found.half, found.deviation, found.count, found.verdict])
    if rows:
        yield (f"Differences: {base} minus the other preset, bits per byte",
               {"minus": "", "evaluator": "", "mean": "+.4f", "+-": ".4f", "deviation": ".4f", "seeds": "d",
                f"{base} is": ""}, rows, INTERVALS)
    close(course)


def overlay_first(words: list[str]) -> list[str]:
    """The words with OVERLAY in front, which is `tiny` where they name none."""
    named = [word for word in words if word.startswith("OVERLAY=")] or ["OVERLAY=tiny"]
    return [named[-1], *(word for word in words if not word.startswith("OVERLAY="))]


def read_row(text: str) -> list[tuple[str, list[str]]]:
    """`name: A=1 B=2` as [(name, words)]; a value may have blanks, as STACK's has. ValueError for anything else."""
    name, colon, words = text.partition(":")
    if not (colon and re.fullmatch(r"[\w.-]+", name.strip(), re.A)):
        raise ValueError
    changed = re.split(r"\s+(?=[A-Z][A-Z0-9_]*=)", words.strip()) if words.strip() else []
    if not all(re.match(r"[A-Z][A-Z0-9_]*=", word) for word in changed):
        raise ValueError
    return [(name.strip(), changed)]


def squeeze_gap(result: dict[str, Any]) -> float:
    """What the squeeze costs: contiguous bits per byte of the artifact minus those of the float weights; NaN without
    them."""
    scores = result["scores"]
    return scores["contiguous"]["val_bpb"] - scores["float"]["val_bpb"] if {"contiguous", "float"} <= {*scores} else (
        math.nan)


def trit_fact(kind: str) -> Callable[[dict[str, Any]], float]:
    """What a run says of its trits at its end; NaN where it has none."""
    return lambda result: result["train"].get("trits", {}).get(kind, math.nan)


class Again(NamedTuple):
    """What is done again with the trained weights of some rows, at no cost of training: the table's title, the rows,
    the stages before the report, the words under their names, and the score of the run that what comes out is compared
    with."""
    title: str
    rows: tuple[str, ...]
    stages: str
    words: dict[str, list[str]]
    over: str


def kind_of(words: Iterable[str]) -> str:
    """The evaluator that such words ask for."""
    return next((word.partition("=")[2] for word in words if word.startswith("EVAL=")), "contiguous")


class Suite(NamedTuple):
    """Rows that belong together, and what they are by themselves: which of them find a shape of their own by the rule,
    the base, words for all of them, seconds and bytes, more facts of a run, and what is done again with some."""
    rows: dict[str, list[str]]
    own_shape: frozenset[str] = frozenset()
    base: str = gpt.SETTINGS["PRESET"][1].default
    words: tuple[str, ...] = ()
    seconds: int = 150
    size: int = 1_000_000
    minutes: int = 600
    facts: dict[str, tuple[str, Callable[[dict[str, Any]], float]]] = {}
    again: Again | None = None


SUITES = {
    "parts": Suite(ROWS),
    "crawler": Suite(CRAWLER_ROWS, OWN_SHAPE, "clowncar", ("GPTQ_CALIBRATION_BATCHES=4",), 40, minutes=120,
                     facts={"squeeze": ("+.4f", squeeze_gap)}, again=Again(
                         "The same weights, squeezed further: bits per byte over those of the float weights",
                         ("one-pass", "two-passes", "base", "eight-passes", "noise", "straight-through"),
                         "calibrate,write,reload,evaluate",
                         {f"int{bits}": [f"MATRIX_BITS={bits}", "POLICY="] for bits in (5, 4, 3)}, "float")),
    "ternary": Suite(TERNARY_ROWS, TERNARY_OWN_SHAPE, "jamone",
                     ("TRAIN_BATCH_TOKENS=2048", "MICRO_BATCH_TOKENS=1024", "TRAIN_LOG_EVERY=20"), 30, 250_000, 120,
                     {"bits a trit": (".3f", trit_fact("bits")), "zeros": (".3f", trit_fact("zeros"))}),
    "hybrid": Suite(HYBRID_ROWS, HYBRID_OWN_SHAPE, "chimera", ("TRAIN_BATCH_TOKENS=2048", "MICRO_BATCH_TOKENS=1024"),
                    20, 400_000, 120, again=Again(
                        "The same artifacts, evaluated otherwise: bits per byte over the contiguous ones",
                        ("base",), "reload,evaluate",
                        {**{f"{passes} passes": [f"EVAL_PASSES={passes}"] for passes in (1, 4)},
                         "exit": ["EVAL_PASSES=4", "LOOP_EXIT=0.05"],
                         "same chunks": ["EVAL=valve", "VALVE_PASSES=2,2,2"],
                         "valve": ["EVAL=valve", "VALVE_BITS=5"]}, "contiguous")),
}


def parts(options: Mapping[str, Any], lab: Lab = LAB, suite: Suite = SUITES["parts"]) -> Iterator[Fields]:
    """The base's shape, runs, and every row's difference to the base, the best first."""
    kinds, seeds, preset, source = options["EVAL"], options["SEEDS"], options["BASE"], lab.source()
    names = options["ROWS"] or ([] if options["ROW"] else [*suite.rows])
    rows = [*((name, suite.rows[name]) for name in names), *options["ROW"]]
    if double := {name for name, _ in rows if [other for other, _ in rows].count(name) > 1 or name == "base"}:
        raise gpt.ConfigError(f"ROW={sorted(double)[0]}: must be a name that no other row has")
    check_words(options["words"], FIXED | SHAPED)
    common = [f"PRESET={preset}", *overlay_first(options["words"])]
    common[2:2] = suite.words
    base = make_variant("base", common, options, lab)
    shape = shape_words(base.config.model.model_dim)
    variants = [base]
    for name, words in rows:
        check_words(words, FIXED)
        variants.append(make_variant(name, [*common, *words], options, lab, None if name in suite.own_shape else shape))
    own = sorted(suite.own_shape & {name for name, _ in rows})
    yield shape_fields(variants, f"Shapes, base {preset}: {shape_rule(options['BYTES'], options['FIT_BITS'])}; rows "
                       "keep it but for what they change" + (f", but {', '.join(own)} have their own" if own else ""),
                       options["FIT_BITS"])
    course = run_all(variants, seeds, options["MINUTES"], source, lab)
    yield run_fields(course, variants, kinds, seeds, f"Runs of parts of {preset}: bits per byte, {options['SECONDS']} "
                    "seconds of training, the same documents and seeds", remarks(course, options, variants))
    lines, facts = [], {**suite.facts, **FACTS}
    for variant in variants:
        mine = [result for (name, _), result in course.results.items() if name == variant.name]
        found = [paired(course.values(variant.name, kind), course.values("base", kind)) for kind in kinds]
        cells: list[Any] = [variant.name]
        for kind, difference in zip(kinds, found, strict=True):
            values = course.values(variant.name, kind)
            cells.append(statistics.fmean(values.values()) if values else None)
            cells += [None, None, "base"] if variant is base else [
                difference.mean, difference.half, difference.verdict]
        cells += [known_mean(map(read, mine)) for _, read in facts.values()]
        changed = " ".join(words) if (words := dict(rows).get(variant.name)) else ""
        key = 0.0 if variant is base else math.inf if found[0].mean is None else found[0].mean
        lines.append((key, [*cells, len(mine), changed]))
    columns = {"row": ""}
    for kind in kinds:
        columns |= {kind: ".4f", f"{kind} minus base": "+.4f", f"{kind} +-": ".4f", f"{kind} is": ""}
    yield (f"Parts of {preset}: bits per byte, difference to the base", {
        **columns, **{name: form for name, (form, _) in facts.items()}, "seeds": "d", "changed": ""},
        [cells for _, cells in sorted(lines, key=lambda line: line[0])], INTERVALS)
    again = suite.again
    if again and (chosen := [variant for variant in variants if variant.name in again.rows]):
        yield again_fields(course, chosen, seeds, again, options["MINUTES"], lab)
    close(course)


def known_mean(values: Iterable[float]) -> float | None:
    """The mean; None where there are no values or one is not a number."""
    values = list(values)
    return statistics.fmean(values) if values and not any(map(math.isnan, values)) else None


def again_fields(course: Course, variants: list[Variant], seeds: list[int], again: Again, minutes: float, lab: Lab
                 ) -> Fields:
    """What other words make of the same trained weights; what could not be run is added to the course's faults."""
    began, rows = lab.clock() - 60 * course.minutes, []
    for variant in variants:
        cells: list[Any] = [variant.name]
        for label, words in again.words.items():
            gaps, kind, program = {}, kind_of(words), ""
            for seed in seeds:
                if (trained := course.results.get((variant.name, seed))) is None:
                    continue
                folder = variant.folder / f"{variant.place(seed).name}_{label.replace(' ', '_')}"
                job = [f"FROM={variant.place(seed)}", f"STAGES={again.stages},report", f"EVAL={kind}", *words,
                       "EVAL_BUDGET_SECONDS=0", f"RUNS_PATH={variant.folder}", f"RUN_ID={folder.name}"]
                # A recipe has one program, whatever the seed.
                program = program or program_digest(lab.pack(gpt.load_config(job, lab.env)))
                found = done_again(folder, job, kind, program, lab)
                if not found and lab.clock() - began > 60 * minutes:
                    course.faults.append(f"MINUTES={minutes:g}: {folder.name} is left; the same command goes on")
                    continue
                if not found:
                    print(f"again: {folder.name}", file=sys.stderr, flush=True)
                    lines = lab.launch(job, variant.folder / f"{folder.name}.out")
                    found = done_again(folder, job, kind, program, lab)
                    if not found:
                        course.faults.extend([f"{folder.name}: {(lines or ['no whole result.json'])[0]}", *lines[1:]])
                        continue
                gaps[seed] = found["scores"][kind]["val_bpb"] - trained["scores"][again.over]["val_bpb"]
            gap = interval(gaps.values())
            cells += [gap.mean, gap.half]
        rows.append(cells)
    columns = {"row": ""}
    for label in again.words:
        columns |= {label: "+.4f", f"{label} +-": ".4f"}
    return (again.title, columns, rows, "95 % t-intervals over seeds; " + "; ".join(
        f"{label} is {' '.join(words)}" for label, words in again.words.items()))


def done_again(folder: Path, job: list[str], kind: str, program: str, lab: Lab) -> dict[str, Any]:
    """result.json of such a run that is finished, with these settings and by this program, else {}."""
    try:
        result = json.loads((folder / "result.json").read_text())
        ran = program_digest((folder / "train_gpt.py").read_bytes())
    except (OSError, ValueError):
        return {}
    same = (result.get("config_hash"), ran) == (gpt.load_config(job, lab.env).digest(), program)
    return result if same and kind in result.get("scores", {}) else {}


def close(course: Course) -> None:
    """ConfigError with what failed, after the tables of what did not."""
    if course.faults:
        raise gpt.ConfigError("\n".join(course.faults))
