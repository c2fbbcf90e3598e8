"""Tries to make every evaluator of a run break the rules, on whole documents of the validation split, with AUDIT=1.

    RUN_ID=audited STAGES=evaluate FROM=runs/x AUDIT=1 ./run.sh

Every pass is the real one: make_guest and score of train_gpt.py, with the run's settings, on the model that was read
back. What a rule says must not change is compared bit by bit. A pass proves something for the positions that it names,
not for others; what an artifact has learned by heart beforehand is not found here.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

SUM_SLACK = 1e-6  # of probabilities that the referee normalises
CLAIM_SLACK = 1e-5  # of those that a guest calls normalised: it computes in fp32
SCORE_SLACK = 2e-5  # between the referee's fp32 nats and those of the offered row in float64
RANK_SLACK = 1e-12  # nats of a target between one rank and two
DOCUMENTS_LOOKED_AT = 2000

# Where the slice is less than eight of the parts after which an evaluator learns, the parts are made smaller.
PARTS = {"ngram": "NGRAM_CHUNK_TOKENS"}


def declared(golf: Any, kind: str, config: Any) -> list[str]:
    """What the settings declare by which one document may reach another under this evaluator."""
    modes = [text.partition(":")[0] for name, holds, text in golf.DECLARED_MODES if name == kind and holds(config)]
    return modes if config.data.doc_isolation or golf.EVALUATORS[kind].within else ["DOC_ISOLATION=0", *modes]


class Slice(NamedTuple):
    """Whole documents in a row: tokens and bytes (n,), the last token a BOS; the document of each target (n,), -1 for
    position 0; the documents' numbers in the split; the most targets of one."""
    tokens: np.ndarray
    bytes: np.ndarray
    owner: np.ndarray
    numbers: list[int]
    longest: int


def pick_slice(val: Any, bos: int, tokens: int, enough: int) -> Slice:
    """The shortest document of more than `enough` targets (else the longest), so that it has several windows or chunks,
    and beside it, from the beginning of the split, those that fit into `tokens` targets; at least one, if there is."""
    starts = np.flatnonzero(val.tokens == bos)
    sizes = np.diff([*starts, len(val.tokens)])[:DOCUMENTS_LOOKED_AT]
    numbers = np.flatnonzero(sizes > 1).tolist() or [0]
    long = min(numbers, key=lambda number: (sizes[number] <= enough, abs(sizes[number] - enough)))
    others, left, chosen = [number for number in numbers if number != long], tokens - sizes[long], [long]
    for number in others:
        if sizes[number] <= left:
            chosen.append(number)
            left -= sizes[number]
    if len(chosen) == 1 and others:
        chosen.append(min(others, key=sizes.__getitem__))
    chosen.sort()
    index = np.concatenate([np.arange(starts[number], starts[number] + sizes[number]) for number in chosen])
    stream = np.append(val.tokens[index], bos).astype(np.int64)
    # The next BOS is the last target of its document.
    owner = np.append(-1, np.cumsum(stream[:-1] == bos) - 1)
    return Slice(stream, np.append(val.bytes[index], 0), owner, chosen, int(sizes[chosen].max()))


class Watch:
    """Takes in every offered row: a digest of it, how far it is from summing to one, as it is and normalised, and the
    nats that it gives to its target. Whole rows are kept at `keep` only."""

    def __init__(self, tokens: np.ndarray, keep: list[int]) -> None:
        self.tokens, self.rows, self.widths = tokens, dict.fromkeys(keep), set()
        self.digests, self.seen = np.zeros(len(tokens), np.uint64), np.zeros(len(tokens), np.int64)
        self.off, self.claim, self.entry = np.zeros((3, len(tokens)))

    def __call__(self, at: np.ndarray, values: Tensor) -> None:
        exact, targets = values.double(), torch.from_numpy(self.tokens[at])[:, None].to(values.device)
        total = exact.logsumexp(-1, keepdim=True)
        self.claim[at] = (exact.exp().sum(-1) - 1).abs().cpu()
        self.off[at] = ((exact - total).exp().sum(-1) - 1).abs().cpu()
        self.entry[at] = (total - exact.gather(-1, targets))[:, 0].cpu()
        self.widths.add(values.shape[-1])
        np.add.at(self.seen, at, 1)
        for place, row in zip(at.tolist(), values.cpu().numpy(), strict=True):
            self.digests[place] = int.from_bytes(hashlib.blake2b(row.tobytes(), digest_size=8).digest(), "little")
            if place in self.rows:
                self.rows[place] = torch.from_numpy(row).double().log_softmax(-1)


class ThreadRank:
    """One rank of a world whose ranks are threads of this process; `slots` and `wait` are those of all."""
    lanes = 1

    def __init__(self, rank: int, slots: list[Any], wait: threading.Barrier, device: torch.device) -> None:
        self.rank, self.size, self.slots, self.wait, self.device = rank, len(slots), slots, wait, device
        self.first, self.played = rank == 0, 0

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, in rank order."""
        self.slots[self.rank] = value
        self.wait.wait()
        found = list(self.slots)
        self.wait.wait()
        return found

    def same(self, value: Any) -> Any:
        """Rank 0's value."""
        return self.gather(value)[0]

    def add_(self, tensor: Tensor) -> Tensor:
        """The tensor, summed over ranks in place."""
        return tensor.copy_(torch.stack(self.gather(tensor.clone())).sum(0))

    def begin_add(self, tensor: Tensor) -> Callable[[], object]:
        """The tensor, summed over ranks in place at once; nothing is left to wait for."""
        self.add_(tensor)
        return lambda: None

    def begin_collect(self, tensor: Tensor) -> tuple[Tensor, Callable[[], object]]:
        """The ranks' tensors (n, ...) as (ranks * n, ...), at once."""
        return torch.cat(self.gather(tensor.clone())), lambda: None

    def each(self, function: Callable[[Any], Any], items: list[Any]) -> list[Any]:
        """function(item) of every item; counts them."""
        self.played += len(items)
        return [function(item) for item in items]

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.gather(None)


def on_ranks(size: int, device: torch.device, work: Callable[[ThreadRank], Any]) -> tuple[list[Any], list[int]]:
    """work(rank) on every rank of a world of threads: results, and jobs played, by rank; the first error is raised."""
    wait, slots = threading.Barrier(size), [None] * size
    ranks = [ThreadRank(rank, slots, wait, device) for rank in range(size)]

    def run(rank: ThreadRank) -> Any:
        try:
            return work(rank)
        except BaseException:
            wait.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(run, rank) for rank in ranks]
    errors = [error for future in futures if (error := future.exception())]
    for error in sorted(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
        raise error
    return [future.result() for future in futures], [rank.played for rank in ranks]


class Bench:
    """One evaluator on the slice: plays passes, each with a fresh guest, and knows where to disturb them."""

    def __init__(self, golf: ModuleType, kind: str, config: Any, model: Any, part: Slice, clock: Callable[[], float]
                 ) -> None:
        self.golf, self.kind, self.config, self.model, self.part, self.clock = golf, kind, config, model, part, clock
        self.row, self.device, tokens = golf.EVALUATORS[kind], next(model.parameters()).device, part.tokens
        self.declared = declared(golf, kind, config)
        self.count, self.began, self.weights, self.note = 0, clock(), self.digest(), ""
        part_name, least = PARTS.get(kind, ""), max(1, len(tokens) // 8)
        if config.flat().get(part_name, 0) > least:
            self.config, self.note = golf.with_settings(config, {part_name: least}), f" with {part_name}={least}"
        self.stages = self.row.plan(tokens, self.config)
        windows = [window for stage in self.stages for job in stage for item in job for window in item.windows]
        self.turn, self.order = np.arange(len(tokens)), "of the stream"
        if self.declared:
            # Documents that reach each other do so in the order of scoring, where a decoder could follow it at all.
            turn = np.zeros(len(tokens), np.int64)
            turn[self.golf.targets_of(windows)] = np.arange(1, len(tokens))
            if all((turn[w.start + 1:w.first] < turn[w.first]).all() for w in windows):
                self.turn, self.order = turn, "of scoring"
        # First, middle and last target of a window in the middle, one that goes on from another where there is one.
        inner = [w for w in windows if tokens[w.stop] != golf.BOS and w.stop > w.first]
        later = [w for w in inner if w.first > w.start + 1] or inner or windows
        first, last = (lambda w: (w.first, w.stop))(sorted(later, key=lambda w: w.first)[len(later) // 2])
        places = {first, (first + last) // 2, last, max(1, len(tokens) // 3)}
        self.at = sorted(t for t in places if t < len(tokens) - 1 and tokens[t] != golf.BOS)
        if not self.at:
            raise golf.CheckError(f"AUDIT_TOKENS: {len(tokens) - 1} targets leave none to change")
        # One target in every document for each pass; one in all where documents reach each other.
        own = [np.flatnonzero((part.owner == index) & (tokens != golf.BOS)) for index in range(len(part.numbers))]
        self.alone = [[t] if self.declared else
                      [t if t in mine else int(mine[number * len(mine) // len(self.at)]) for mine in own if len(mine)]
                      for number, t in enumerate(self.at)]
        self.score, self.watch = self.play(tokens)

    @functools.cached_property
    def behind(self) -> dict[int, tuple[Any, Watch]]:
        """Passes with other tokens behind a target."""
        return {t: self.disturbed(self.turn > self.turn[t], t) for t in self.at}

    def digest(self) -> str:
        """Of the model that every guest is given."""
        return self.golf.weights_digest(dict(self.model.named_parameters()))

    def play(self, tokens: np.ndarray, config: Any = None, world: Any = None) -> tuple[Any, Watch]:
        """The score of the slice, or of one with other tokens, settings or ranks, as stage_evaluate takes it."""
        golf, config = self.golf, config or self.config
        world, watch = world or golf.World(device=self.device), Watch(tokens, sum(self.alone, []))
        val = golf.Validation(tokens, self.part.bytes, len(self.part.numbers), True)
        guest = golf.make_guest(self.kind, self.model, config, world)
        self.count, self.claims = self.count + 1, guest.normalised
        return golf.score(self.kind, guest, val, config, world, self.clock, watch=watch), watch

    def disturbed(self, where: np.ndarray, seed: int) -> tuple[Any, Watch]:
        """A pass with other tokens at `where`; every BOS stays, so that the plan does."""
        tokens, low, high = self.part.tokens, self.golf.BOS + 1, self.config.data.vocab_size
        fresh = np.random.default_rng(seed).integers(low, high, len(tokens))
        fresh = np.where(fresh == tokens, low + (fresh + 1 - low) % (high - low), fresh)
        return self.play(np.where(where & (tokens != self.golf.BOS), fresh, tokens))

    def differs(self, other: tuple[Any, Watch], scores: np.ndarray, rows: np.ndarray) -> str:
        """What another pass has otherwise among these targets' scores and these targets' offers; empty if nothing."""
        gap = np.abs(self.score.by_target - other[0].by_target) * scores
        moved = np.flatnonzero((self.watch.digests != other[1].digests) & rows)
        if gap.any():
            return f"{(gap > 0).sum()} scores differ, most that of target {gap.argmax()}, by {gap.max():.3g} nats"
        return f"{len(moved)} offered rows differ, first that of target {moved[0]}" if len(moved) else ""


Verdict = tuple[bool, str]


def causality(bench: Bench) -> Verdict:
    """Scores and offers do not depend on tokens behind them."""
    for t, other in bench.behind.items():
        past = bench.turn <= bench.turn[t]
        if fault := bench.differs(other, past, past):
            return False, f"with other tokens behind target {t}, {fault}"
    return True, f"other tokens behind targets {bench.at} in the order {bench.order}{bench.note}: all before identical"


def peeking(bench: Bench, places: list[int]) -> str:
    """What differs up to these targets, one in a document, where they alone are changed; empty if nothing does."""
    turn, owner = bench.turn, bench.part.owner
    score, watch = bench.disturbed(np.isin(np.arange(len(turn)), places), places[0])
    limit = {owner[t]: turn[t] for t in places}
    until = np.array([limit.get(document, max(limit.values())) for document in owner])
    if fault := bench.differs((score, watch), turn < until, turn <= until):
        return f"with another token at targets {places} alone, {fault}"
    for t in places:
        nats, promised = score.by_target[t], -float(bench.watch.rows[t][watch.tokens[t]])
        if not abs(nats - promised) <= SCORE_SLACK * max(1.0, promised):
            return f"another token at target {t} scores {nats:.6f} nats, the offer for it said {promised:.6f}"
    return ""


def realised_token(bench: Bench) -> Verdict:
    """The distribution for a target does not depend on that target, and the score is its entry."""
    for t, other in bench.behind.items():
        # The first token that was changed is the realised one of the row behind t.
        if fault := bench.differs(other, bench.turn < 0, bench.turn == bench.turn[t] + 1):
            return False, f"with other tokens from the one behind {t} on, {fault}"
    for places in bench.alone:
        # A fault may also be that documents reach each other, which another rule judges: one by one it is not.
        fault = peeking(bench, places)
        if fault and (len(places) == 1 or (fault := next(filter(None, (peeking(bench, [t]) for t in places)), ""))):
            return False, fault
    places = sorted({t for row in bench.alone for t in row})
    return True, f"another token at targets {places}: offers for them identical, and their entry is the score"


def distribution(bench: Bench) -> Verdict:
    """Every target got one row over the whole vocabulary that sums to one, and its entry is the score."""
    watch, nats, claims = bench.watch, bench.score.by_target[1:], bench.claims
    off, claim = watch.off.max(), watch.claim[1:].max()
    gap = (np.abs(watch.entry[1:] - nats) / np.maximum(1, nats)).max()
    good = (watch.seen[1:] == 1).all() and watch.widths == {bench.config.data.vocab_size} and off <= SUM_SLACK
    return bool(good and gap <= SCORE_SLACK and (not claims or claim <= CLAIM_SLACK)), (
        f"{watch.seen.sum()} rows of {max(watch.widths)} for {len(nats)} targets, sums within {off:.1e} of 1"
        + (f" ({claim:.1e} as offered)" if claims else "") + f", scores within {gap:.1e} of the entries")


def previous_document(bench: Bench) -> Verdict:
    """The scores of a document do not depend on the one before it, nor on any other, unless settings say so."""
    owner, largest, at, count = bench.part.owner, 0.0, 0, len(bench.part.numbers)
    if count < 2:
        return True, "one document only, so there is none before another"
    # Any two documents differ in a bit of their numbers, so that each is once changed where the other is not.
    for bit, side in itertools.product(range((count - 1).bit_length()), (0, 1)):
        mine, rest = (owner >> bit) % 2 == side, (owner >= 0) & ((owner >> bit) % 2 != side)
        other = bench.disturbed(mine & (owner >= 0), 2 * bit + side)
        if (fault := bench.differs(other, rest, rest)) and not bench.declared:
            return False, f"documents {np.unique(owner[mine & (owner >= 0)]).tolist()} of {count} changed: {fault}"
        gap = np.abs(bench.score.by_target - other[0].by_target) * rest
        largest, at = max((largest, at), (float(gap.max()), int(gap.argmax())))
    if bench.declared:
        reach = f"up to {largest:.3g} nats, at target {at}" if largest else "but none reaches another on this slice"
        return True, f"declared: {', '.join(bench.declared)}; {reach}"
    return True, f"{count} documents, each changed while any other was not: the others' scores and offers identical"


def rank_count(bench: Bench) -> Verdict:
    """Two ranks give the same scores and the same journal as one."""
    config, one, tokens, note = bench.config, bench.score, bench.part.tokens, ""
    if max(map(len, bench.stages)) < 2:
        # With the run's settings one job holds all of the slice; smaller batches give both ranks work.
        small = {"EVAL_BATCH_TOKENS": config.eval.eval_seq_len, "TTT_BATCH_SIZE": 1}
        config, note = bench.golf.with_settings(config, small), ", in batches of one row,"
        one, _ = bench.play(tokens, config)
    found, played = on_ranks(2, bench.device, lambda rank: bench.play(tokens, config, rank)[0])
    gap = max(float(np.abs(score.by_target - one.by_target).max()) for score in found)
    same = all(score.ledger == one.ledger for score in found)
    return gap <= RANK_SLACK and same, (f"{played[0]} and {played[1]} jobs{note} on two ranks: scores within {gap:.1e} "
                                        f"nats of one rank's, {'the same' if same else 'ANOTHER'} journal")


def read_journal(text: str, owner: np.ndarray) -> tuple[int, str]:
    """Updates in a journal, a line a job, and its first fault against: every target once, left to right within a
    document that is learned from, no update before the score of what it saw, in the same job (for an update between
    stages: in the lines before)."""
    scored, learned, edge = np.zeros(len(owner), np.int64), 0, {}
    for line in text.split("\n"):
        entries = [(word, int(a), int(b)) for word, a, b in re.findall(r"(score|learn) (\d+) (\d+);", line)]
        if "".join(f"{word} {a} {b};" for word, a, b in entries) != line:
            return learned, f"a line of the journal cannot be read: {line[:40]}"
        words = {word for word, _, _ in entries}
        known = scored.copy() if words == {"learn"} else np.zeros_like(scored)
        for word, a, b in entries:
            if word == "learn":
                learned += 1
                if not known[a:b + 1].all():
                    return learned, f"an update saw targets {a}..{b} before their score"
                continue
            if "learn" in words and edge.get(owner[a], 0) >= a:
                return learned, f"targets {a}..{b} were scored behind later ones of their document"
            edge[owner[a]] = b
            scored[a:b + 1] += 1
            known[a:b + 1] += 1
    missed = int((scored[1:] != 1).sum()) + int(scored[0])
    return learned, f"{missed} targets were not scored exactly once" if missed else ""


def single_pass(bench: Bench) -> Verdict:
    """The journal shows every target scored once, and before every update that saw it."""
    text, ledger = bench.score.journal, bench.score.ledger
    learned, fault = read_journal(text, bench.part.owner)
    if not fault and (ledger["journal_sha256"] != hashlib.sha256(text.encode()).hexdigest()
                      or not ledger["scored_once"] or ledger["targets"] != len(bench.turn) - 1):
        fault = f"the ledger {ledger} is not that of the journal"
    return not fault, fault or f"{ledger['targets']} targets scored once, {learned} spans learned from once scored"


def reproducible(bench: Bench) -> Verdict:
    """A fresh guest gives the same again, and no guest has touched the model."""
    every = bench.turn >= 0
    fault = bench.differs(bench.play(bench.part.tokens), every, every)
    if not fault and bench.digest() != bench.weights:
        fault = "a guest changed the model that others are given"
    seconds = bench.clock() - bench.began
    return not fault, fault or f"a fresh guest: identical scores and offers; {bench.count} passes, {seconds:.1f} s"


RULES: dict[str, Callable[[Bench], Verdict]] = {
    "causality": causality, "realised_token": realised_token, "distribution": distribution,
    "previous_document": previous_document, "rank_count": rank_count, "single_pass": single_pass,
    "reproducible": reproducible}


def count_bytes(golf: ModuleType, config: Any, data: Any) -> Verdict:
    """The bytes that divide the score are those of the text that the tokenizer decodes, document by document."""
    val, manifest, rule, total = data.val, data.manifest, data.manifest["byte_rule"], int(data.val.bytes.sum())
    uniform = math.log2(config.data.vocab_size) * (len(val.tokens) - 1) / max(1, total)
    uniform = f"a uniform guess has {uniform:.4f} BPB"
    if rule == "sidecar":
        promised = manifest["val"]["counted_bytes"]
        return total == promised, (f"{total} bytes in the sidecar, {promised} in the manifest; the text cannot be "
                                   f"decoded here; {uniform}")
    path = config.data.tokenizer_path or Path(config.data.data_path) / manifest["tokenizer"]["path"]
    tokenizer = golf.load_tokenizer(Path(path), config.data.vocab_size)
    starts = [*np.flatnonzero(val.tokens == golf.BOS).tolist(), len(val.tokens)][:DOCUMENTS_LOOKED_AT + 1]
    for number, (start, end) in enumerate(itertools.pairwise(starts)):
        # A document's targets: without its own BOS, with the next.
        tokens, counted = val.tokens[start + 1:end + 1].tolist(), int(val.bytes[start + 1:end + 1].sum())
        if counted != (size := len(tokenizer.decode(tokens).encode())):
            spaced = sum(tokenizer.id_to_piece(token).startswith("\u2581") for token in tokens)
            return False, (f"document {number}: {counted} bytes counted, {size} in the text that the tokenizer decodes "
                           f"({spaced} pieces begin with a space)")
    counted = int(val.bytes[1:starts[-1] + 1].sum())
    return True, (f"{counted} bytes of {len(starts) - 1} documents, by the rule {rule}, are those of the texts that "
                  f"the tokenizer decodes, each leading space once; {uniform}")


def attempt(golf: ModuleType, work: Callable[..., Any], *parts: Any) -> Any:
    """What work returns, or the verdict where a check, most likely the referee's, stopped it."""
    try:
        return work(*parts)
    except golf.CheckError as error:
        return False, f"stopped: {error}"


def audit(golf: ModuleType, config: Any, model: Any, data: Any, tokens: int, clock: Callable[[], float]
          ) -> dict[str, dict[str, Any]]:
    """{rule: {"pass": bool, "evidence": str}} of all evaluators that EVAL names, on about `tokens` targets of `data`.

    `golf` is the module train_gpt (`__main__` in a packed run), `config` what the evaluators ran with, `model` the
    artifact's, on its device. One process is enough; nothing is written.
    """
    part = pick_slice(data.val, golf.BOS, tokens, max(config.eval.eval_seq_len, config.ttt.ttt_chunk_size))
    found: dict[str, list[tuple[str, Verdict]]] = {rule: [] for rule in RULES}
    before, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    if next(model.parameters()).is_cuda:
        # Kernels that give the same bits again, wherever a GPU has them.
        torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        for kind in config.eval.eval:
            bench = attempt(golf, Bench, golf, kind, config, model, part, clock)
            for rule, judge in RULES.items():
                found[rule].append((kind, bench if isinstance(bench, tuple) else attempt(golf, judge, bench)))
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warns)
    verdicts = {rule: {"pass": all(good for _, (good, _) in rows),
                       "evidence": "; ".join(f"{kind}: {text}" for kind, (_, text) in rows)}
                for rule, rows in found.items()}
    shown = ", ".join(map(str, part.numbers[:12])) + (", ..." if len(part.numbers) > 12 else "")
    where = f"documents {shown} of {data.val.documents}, {len(part.tokens) - 1} targets, up to {part.longest} in one; "
    verdicts["causality"]["evidence"] = where + verdicts["causality"]["evidence"]
    good, text = count_bytes(golf, config, data)
    return verdicts | {"bytes": {"pass": good, "evidence": text}}
