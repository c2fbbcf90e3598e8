"""Text from the artifact of a finished run: sampled, searched ahead, held to a grammar, and measured.

    ./run.sh generate FROM=runs/NAME PROMPT="Once upon a time" [NAME=value ...]

Read are config.json and artifact.bin of the run folder and the tokenizer of its dataset, nothing else. The text goes to
standard output as it is made, without the prompt, and everything else to standard error; it ends with the model's end
of document (BOS), with the grammar, or after TOKENS. The text so far is read once and remembered (train_gpt.Memory); a
model that cannot remember reads it anew for each token, and says so.

SPECULATE drafts what followed the last time that the text ended as it does now, and reads a whole draft in one forward.
A drafted token is taken with its probability, else another one in proportion to theirs: the text has the distribution
that it has without drafts, and with GREEDY=1 it is the same text, both up to the rounding of forwards over one token
or several. GRAMMAR lets through only tokens that a grammar can
go on with, by llguidance; it binds what is made, not the prompt, and with a CaseOps tokenizer a grammar of your own
sees the text as that tokenizer has it, in lower case with control characters. PACKED=1 keeps ternary matrices in two
bits a weight (tools/packed.py).

Exit codes: 0, 2 for a mistake in the words, 3 where TOKENS ended before the grammar was satisfied. Beside the options
below, DATA_PATH, TOKENIZER_PATH, COMPUTE_DTYPE, KERNELS and THREADS go to train_gpt.py. Each may
stand in the environment, too. Options:

"""

from __future__ import annotations

import argparse
import codecs
import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as run.sh has it for training: read when torch is loaded

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [folder for folder in (str(ROOT), str(ROOT / "data")) if folder not in sys.path]

import caseops  # noqa: E402
import prepare  # noqa: E402

import train_gpt as gpt  # noqa: E402
from tools import packed  # noqa: E402
from tools.console import UsageError, choice, number, table_text  # noqa: E402

PASSES = {"evaluation": 0, "fast": 1, "balanced": 2, "reasoning": 4}  # of a ( ) group, 0 as evaluation has it
SETTINGS = ("DATA_PATH", "TOKENIZER_PATH", "COMPUTE_DTYPE", "KERNELS", "THREADS")
READ_TOKENS = 1024  # of a prompt in one forward
LEAST_MATCH = 2  # tokens at the end of the text that must have stood there before, for a draft
MOST_MATCH, MOST_PLACES = 32, 256  # of them that are compared, at so many places, the last first
INTERVALS = 8

# Balanced text, with anything between the brackets.
BRACKETS = r"""
start: part*
part: TEXT | "(" part* ")" | "[" part* "]" | "{" part* "}"
TEXT: /[^()\[\]{}]+/
"""
# Name -> the grammar as llguidance has it. JSON is without white space outside of strings, which could go on for ever.
GRAMMARS: dict[str, Callable[[Any], str]] = {
    "json": lambda matcher: matcher.grammar_from_json_schema({}, overrides={"whitespace_flexible": False}),
    "brackets": lambda matcher: matcher.grammar_from_lark(BRACKETS)}


# ---- words


def read_grammar(text: str) -> str:
    """Reads GRAMMAR: a name, or a file that is there."""
    try:
        if text in ("none", *GRAMMARS) or (text.endswith(".lark") and Path(text).is_file()):
            return text
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text}: cannot be read ({error.strerror})") from None
    raise argparse.ArgumentTypeError(f"{text}: must be none, {', '.join(GRAMMARS)} or a .lark file that is there")


def read_flag(text: str) -> bool:
    """Reads 0 or 1."""
    return choice("01")(text) == "1"


def option(default: Any, read: Callable[[str], Any], text: str) -> Any:
    """A field that declares one option: default, reader, one line of help."""
    return dataclasses.field(default=default, metadata={"read": read, "text": text})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """How text is made; a word NAME=value for every field."""
    tokens: int = option(200, number(int, 1, 1_000_000), "the most tokens that are made")
    temperature: float = option(0.7, number(float, 0, 100), "logits are divided by it; 0 is greedy")
    top_p: float = option(0.92, number(float, 0, 1, above=True), "the likeliest tokens that reach this together stay")
    repetition: float = option(1.08, number(float, 0.01, 100), "positive logits of tokens of the text are "
                               "divided by it, others multiplied")
    seed: int = option(0, number(int, 0, 2**63 - 1), "of the draws")
    greedy: bool = option(False, read_flag, "always the likeliest token")
    mode: str = option("evaluation", choice(PASSES), f"passes of a ( ) group, as training had them at most: "
                       f"{', '.join(PASSES)}")
    speculate: int = option(0, number(int, 0, 256), "the longest draft, in tokens; 0 is none")
    packed: bool = option(False, read_flag, "ternary matrices stay packed")
    grammar: str = option("none", read_grammar, "none, json, brackets (balanced) or a .lark file")
    ignore_eos: bool = option(False, read_flag, "the end of a document is never chosen; not with a GRAMMAR")
    report: bool = option(False, read_flag, "speed and memory, on standard error or in the JSON")
    json: bool = option(False, read_flag, "one JSON object instead of the text")


OPTIONS = {field.name.upper(): field for field in dataclasses.fields(Options)}


class Words(NamedTuple):
    """The command line: run folder, prompt, options, settings for train_gpt.py."""
    folder: Path
    prompt: str
    options: Options
    settings: list[str]


def parse(argv: list[str], environ: Mapping[str, str]) -> Words:
    """The command line and, behind it, the environment; raises UsageError."""
    values: dict[str, Any] = {}
    texts, settings = {"FROM": "", "PROMPT": ""}, []
    known = [f"{name}={environ[name]}" for name in (*texts, *OPTIONS, *SETTINGS) if environ.get(name)]
    for word in (*known, *argv):
        name, equals, text = word.partition("=")
        if equals and name in OPTIONS:
            try:
                values[name.lower()] = OPTIONS[name].metadata["read"](text)
            except argparse.ArgumentTypeError as error:
                raise UsageError(" ".join(f"{name}={error}".split())) from None
        elif equals and name in texts:
            texts[name] = text
        elif equals and name in SETTINGS:
            settings.append(word)
        else:
            raise UsageError(f"{word.splitlines()[0] if word else word}: must be FROM=, PROMPT=, {', '.join(OPTIONS)} "
                             f"or {', '.join(SETTINGS)}, each NAME=value")
    folder = Path(texts["FROM"])
    try:
        there = texts["FROM"] and all((folder / name).is_file() for name in ("config.json", "artifact.bin"))
    except OSError as error:
        raise UsageError(f"FROM={texts['FROM']}: cannot be read ({error.strerror})") from None
    if not there:
        raise UsageError(f"FROM={texts['FROM']}: must be a run folder with config.json and artifact.bin")
    try:
        texts["PROMPT"].encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"PROMPT: must be UTF-8, is not at character {error.start}") from None
    options = Options(**values)
    if options.ignore_eos and options.grammar != "none":
        raise UsageError(f"IGNORE_EOS=1: not with GRAMMAR={options.grammar}, which says itself where a text may end")
    return Words(folder, texts["PROMPT"], options, settings)


# ---- the model


class Held(NamedTuple):
    """An artifact that is ready to make text: configuration, model, tokenizer, lines about them, and what of it is
    packed, None where nothing is."""
    config: gpt.Config
    model: gpt.GPT
    tokenizer: Any
    lines: tuple[str, ...] = ()
    packing: packed.Packed | None = None


def find_tokenizer(data: gpt.DataSettings, facts: dict[str, Any]) -> Any:
    """The tokenizer that the artifact was trained with; ConfigError where it is not found."""
    path = Path(data.tokenizer_path)
    if not data.tokenizer_path:
        folder = Path(data.data_path)
        manifest = gpt.read_json_object(folder / "manifest.json", f"DATA_PATH={folder}")
        try:
            path = folder / manifest["tokenizer"]["path"]
        except (KeyError, TypeError):
            raise gpt.ConfigError(f"DATA_PATH={folder}: manifest.json names no tokenizer; TOKENIZER_PATH= does"
                                  ) from None
    tokenizer = gpt.load_tokenizer(path, facts["vocab_size"])
    if gpt.sha256_file(path) != facts.get("tokenizer_sha256"):
        raise gpt.ConfigError(f"TOKENIZER_PATH={path}: not the tokenizer that the artifact was trained with")
    return tokenizer


def load(folder: Path, words: Iterable[str] = (), pack: bool = False) -> Held:
    """The artifact of a run folder, as the stage evaluate reads it, on this machine's device; ConfigError where a part
    of it is not there."""
    config = gpt.load_config([f"FROM={folder}", "STAGES=evaluate", *words], {})
    world, threads = gpt.share_threads(gpt.make_world({}), config.system.threads, 1, 1)
    dtype, path = gpt.pick_dtype(config.system.compute_dtype, world.device), folder / "artifact.bin"
    kernels, _ = gpt.pick_kernels(config.system.kernels, world.device, dtype, config.model)
    facts, weights = gpt.load_artifact(path)
    model = gpt.make_model_from(facts, weights, kernels, dtype, path).requires_grad_(False)
    lines = [f"{path}: {sum(gpt.count_roles(model).values()):,} parameters, {str(dtype)[6:]} on {world.device}, "
             f"{threads} threads"]
    found = None
    if pack:
        found = packed.pack_model(model, gpt.routes_of(model, config.artifact), weights, None if (
            world.device.type == "cpu") else packed.Kernel(None, "packed: on a GPU matrices are unpacked for every "
                                                                 "product"))
        lines += [found.line, f"packed: {len(found.names)} matrices in {found.bytes:,} bytes, {found.share:.3f} of the "
                              f"{found.plain_bytes:,} that bf16 takes"
                  ] if found.names else ["PACKED=1: the model has no ternary matrix; changes nothing"]
        lines += [f"packed: left as they are, because not ternary: {', '.join(found.left)}"] if found.left else []
    return Held(config, model.to(world.device), find_tokenizer(config.data, facts), tuple(lines),
                found if found and found.names else None)


def encode_prompt(tokenizer: Any, text: str) -> list[int]:
    """BOS and the tokens of the text, as data/prepare.py makes documents."""
    return [gpt.BOS, *prepare.encode_document(tokenizer, text, prepare.is_lossless(tokenizer))]


def pick_phase(model: gpt.GPT, mode: str, eval_passes: int = 0) -> tuple[gpt.Phase, str]:
    """The visits of a mode, and a line about them, "" for evaluation's. Skips join pairs of blocks, which depend on the
    number of passes: those that a model has not learned, it cannot have."""
    wanted = PASSES[mode]
    usual = gpt.plan_phase(model.settings, 1.0, passes=eval_passes)
    if not wanted:
        return usual, ""
    if not gpt.repeats(model.settings.stack):
        return usual, f"MODE={mode}: STACK={model.settings.stack} has no ( ) group of several passes; changes nothing"
    for count in range(wanted, 0, -1):
        phase = gpt.plan_phase(model.settings, 1.0, most=count, passes=count)
        if all(f"{before}_{behind}" in model.skips for before, behind in phase.skips()):
            passes = 1 + max(step.turn.number for step in phase.steps if step.turn)
            return phase, f"MODE={mode}: {passes} pass{'es' * (passes > 1)} of a ( ) group at most" + (
                f", {wanted} are not in training" if passes < wanted else "")
    return usual, f"MODE={mode}: skips of so few passes are not in training; changes nothing"


def memory_unusable(settings: gpt.ModelSettings) -> str | None:
    """Why a model cannot read a text in pieces, or None."""
    if "T" in gpt.letters_of(settings.stack) and (settings.titans_depth == 2 or settings.titans_context):
        return (f"TITANS_DEPTH={settings.titans_depth}, TITANS_CONTEXT={int(settings.titans_context)}: such a memory "
                "learns by whole chunks and cannot be read token by token")
    return None


class Reader(Protocol):
    """What reads a text piece by piece."""

    def read(self, tokens: list[int], count: int) -> Tensor:
        """Read on; fp32 logits (count, V) behind each of the last `count` tokens, on the CPU."""

    def copy(self) -> Reader:
        """Another one that goes on from here."""

    def bytes(self) -> int:
        """Bytes of what it keeps of the text."""


class Rereading:
    """Reads the whole text anew each time: the reference."""

    def __init__(self, model: gpt.GPT, forward: Callable[..., Tensor], text: tuple[int, ...] = ()) -> None:
        self.model, self.forward, self.text = model, forward, text

    @torch.inference_mode()
    def read(self, tokens: list[int], count: int) -> Tensor:
        self.text = (*self.text, *tokens)
        return self.logits(self.forward(self.row(self.text), None), count)

    def row(self, tokens: Iterable[int]) -> Tensor:
        """Tokens as (1, T) where the model is."""
        return torch.tensor([list(tokens)], dtype=torch.long, device=self.model.tok_emb.device)

    def logits(self, hidden: Tensor, count: int) -> Tensor:
        """fp32 logits (count, V) of the last of hidden (1, T, D), on the CPU."""
        return self.model.logits(hidden[0, -count:]).float().cpu()

    def copy(self) -> Rereading:
        return Rereading(self.model, self.forward, self.text)

    def bytes(self) -> int:
        return 0


class Remembering(Rereading):
    """Reads each token once."""

    def __init__(self, model: gpt.GPT, forward: Callable[..., Tensor], memory: gpt.Memory | None = None) -> None:
        super().__init__(model, forward)
        self.memory = memory or gpt.Memory()

    @torch.inference_mode()
    def read(self, tokens: list[int], count: int) -> Tensor:
        for start in range(0, len(tokens), READ_TOKENS):
            hidden = self.forward(self.row(tokens[start:start + READ_TOKENS]), None, memory=self.memory)
        return self.logits(hidden, count)

    def copy(self) -> Remembering:
        return Remembering(self.model, self.forward, self.memory.copy())

    def bytes(self) -> int:
        return self.memory.bytes()


def make_reader(held: Held, mode: str, say: Callable[[str], None]) -> Reader:
    """A reader of the model in a mode."""
    phase, line = pick_phase(held.model, mode, held.config.eval.eval_passes)
    reason = memory_unusable(held.model.settings)
    for told in (line, f"{reason}; the whole text is read anew for each token" if reason else ""):
        if told:
            say(told)
    return (Rereading if reason else Remembering)(held.model, gpt.make_forward(held.model, phase,
                                                                               held.config.eval.loop_exit))


# ---- sampling


def penalise(logits: Tensor, seen: Tensor, factor: float) -> Tensor:
    """Logits (V,) with those of `seen` tokens (V,) divided by the factor where they are positive, else multiplied.
    Source: CTRL."""
    return torch.where(seen, torch.where(logits > 0, logits / factor, logits * factor), logits)


def nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """The smallest set of likeliest tokens that reaches top_p together, at sum 1; (V,) -> (V,). Of equals the first
    stay. Source: Holtzman et al. 2020."""
    if top_p >= 1:
        return probabilities
    ordered, index = probabilities.sort(descending=True, stable=True)
    before = ordered.cumsum(0) - ordered
    kept = torch.zeros_like(probabilities).scatter_(0, index, torch.where(before < top_p, ordered, 0.0))
    return kept / kept.sum()


def chances(logits: Tensor, seen: Tensor, options: Options, allowed: Tensor | None = None) -> Tensor:
    """Probabilities (V,), fp64, of the next token from its logits, of which only `allowed` (V,) take part."""
    wide = logits.double() if allowed is None else logits.double().masked_fill(~allowed, -math.inf)
    wide = penalise(wide, seen, options.repetition)
    if options.greedy or not options.temperature:
        return torch.zeros_like(wide).index_fill_(0, wide.argmax(), 1.0)
    return nucleus(((wide - wide.max()) / options.temperature).softmax(0), options.top_p)


def sample(probabilities: Tensor, generator: torch.Generator) -> int:
    """A token drawn from probabilities (V,)."""
    return int(torch.multinomial(probabilities, 1, generator=generator))


def without(probabilities: Tensor, token: int) -> Tensor:
    """Probabilities (V,) of the others, where it is not that token."""
    rest = probabilities.clone()
    rest[token] = 0.0
    return rest / rest.sum()


def settle(probabilities: Tensor, drafted: int, generator: torch.Generator) -> int:
    """A token with these probabilities (V,): the drafted one, or one drawn from the others. Source: Leviathan et al.
    2023, with a draft that is certain."""
    if torch.rand((), dtype=torch.float64, generator=generator) < probabilities[drafted]:
        return drafted
    return sample(without(probabilities, drafted), generator)


class Drafts:
    """What followed the longest end of the text that stood there before, of up to MOST_MATCH tokens; of equals the
    last."""

    def __init__(self, text: Iterable[int]) -> None:
        self.text: list[int] = []
        self.ends: dict[tuple[int, ...], list[int]] = {}
        for token in text:
            self.add(token)

    def add(self, token: int) -> None:
        """The text goes on with this token."""
        # A place is entered when the next token is there: only then something followed.
        if len(self.text) >= LEAST_MATCH:
            self.ends.setdefault(tuple(self.text[-LEAST_MATCH:]), []).append(len(self.text))
        self.text.append(token)

    def propose(self, most: int) -> list[int]:
        """Up to `most` tokens, none without a match."""
        best, place, text = 0, 0, self.text
        for end in reversed(self.ends.get(tuple(text[-LEAST_MATCH:]), [])[-MOST_PLACES:] if most else []):
            size = LEAST_MATCH
            while size < min(end, MOST_MATCH) and text[end - size - 1] == text[-size - 1]:
                size += 1
            if size > best:
                best, place = size, end
            if size == MOST_MATCH:
                break
        draft: list[int] = []
        while best and len(draft) < most:  # what followed may reach into the draft itself: then it repeats
            draft.append(text[place] if place < len(text) else draft[place - len(text)])
            place += 1
        return draft


class Pieces:
    """A SentencePiece tokenizer as llguidance asks for it: the bytes of every token, which are special, and a function
    that encodes. The end of a document is the beginning of the next."""

    def __init__(self, tokenizer: Any) -> None:
        table = prepare.piece_bytes(tokenizer)
        self.bos_token_id = self.eos_token_id = gpt.BOS
        self.special_token_ids = [token for token, piece in enumerate(table) if not piece]
        self.tokens = [piece or tokenizer.id_to_piece(token).encode() for token, piece in enumerate(table)]
        self.encode = tokenizer.encode

    def __call__(self, text: str) -> list[int]:
        return self.encode(text)


class Grammar:
    """Which tokens may follow, by llguidance."""

    def __init__(self, name: str, tokenizer: Any) -> None:
        try:
            import llguidance
        except ImportError:
            raise gpt.ConfigError(f"GRAMMAR={name}: needs the package llguidance (pip install llguidance)") from None
        pieces = llguidance.LLTokenizer(llguidance.TokenizerWrapper(Pieces(tokenizer)))
        make = GRAMMARS.get(name) or (lambda matcher: matcher.grammar_from_lark(Path(name).read_text(encoding="utf-8")))
        try:
            self.name, self.matcher = name, llguidance.LLMatcher(pieces, make(llguidance.LLMatcher), log_level=0)
        except (OSError, ValueError) as error:
            raise gpt.ConfigError(f"GRAMMAR={name}: cannot be read ({error})") from None
        if self.matcher.is_error():
            raise gpt.ConfigError(f"GRAMMAR={name}: {' '.join(self.matcher.get_error().split())[:300]}")

    def allowed(self) -> Tensor:
        """The tokens (V,) that may follow, BOS where the text may end; CheckError where none may."""
        mask = torch.frombuffer(bytearray(self.matcher.compute_logit_bias()), dtype=torch.uint8) > 0
        if self.matcher.is_error() or not mask.any():
            reason = " ".join(self.matcher.get_error().split())[:300] or "none of the vocabulary fits"
            raise gpt.CheckError(f"GRAMMAR={self.name}: no token can follow ({reason})")
        return mask

    def take(self, token: int) -> None:
        """The text goes on with this token, which was allowed; CheckError where the parser gives up."""
        if not self.matcher.consume_token(token):
            reason = " ".join(self.matcher.get_error().split())[:300] or "a limit of the parser"
            raise gpt.CheckError(f"GRAMMAR={self.name}: cannot go on ({reason})")

    @property
    def complete(self) -> bool:
        """Whether the text may end here."""
        return self.matcher.is_accepting()

    @property
    def ended(self) -> bool:
        """Whether it must."""
        return self.matcher.is_stopped()


# ---- making text


@dataclasses.dataclass
class Meter:
    """What was measured while text was made: seconds for the prompt; times at the beginning and behind each token;
    forwards behind the prompt; tokens drafted and taken of those; bytes of what is kept of the text; why it ended
    (tokens, end, grammar or a fault of that), and whether the grammar, where there is one, was satisfied."""
    prompt_tokens: int = 0
    prompt_seconds: float = 0.0
    times: list[float] = dataclasses.field(default_factory=list)
    forwards: int = 0
    drafted: int = 0
    accepted: int = 0
    state_bytes: int = 0
    stopped: str = "tokens"
    complete: bool = True


class Choice:
    """Chooses token after token: what was seen, the grammar's state, the random stream."""

    def __init__(self, prompt: list[int], options: Options, grammar: Grammar | None) -> None:
        self.options, self.grammar, self.seen = options, grammar, None
        self.prompt = [token for token in prompt if token != gpt.BOS]
        self.generator = torch.Generator().manual_seed(options.seed)

    def token(self, logits: Tensor, drafted: int | None) -> int:
        """The next token from its logits (V,), by way of a drafted one where there is one."""
        if self.seen is None:
            self.seen = torch.zeros(len(logits), dtype=torch.bool)
            self.seen[self.prompt] = True
        allowed = None if self.grammar is None else self.grammar.allowed()
        if self.options.ignore_eos:
            allowed = torch.arange(len(logits)) != gpt.BOS
        found = chances(logits, self.seen, self.options, allowed)
        return sample(found, self.generator) if drafted is None else settle(found, drafted, self.generator)

    def take(self, token: int) -> str:
        """The text goes on with this token; why it ends before or behind it ("end", "grammar"), or ""."""
        if token == gpt.BOS:
            return "end"
        self.seen[token] = True
        if self.grammar is not None:
            self.grammar.take(token)
            return "grammar" if self.grammar.ended else ""
        return ""


def continue_text(reader: Reader, prompt: list[int], options: Options, emit: Callable[[int], None],
                  grammar: Grammar | None = None, meter: Meter | None = None) -> list[int]:
    """The tokens behind a prompt that begins with BOS; `emit` gets each when it is settled. What is kept of the text
    stands in the reader's last copy and is measured."""
    meter, began = meter or Meter(), time.perf_counter()
    picker, drafts, made = Choice(prompt, options, grammar), Drafts(prompt), []
    logits = reader.read(prompt, 1)[0]
    meter.prompt_tokens, meter.prompt_seconds = len(prompt), time.perf_counter() - began
    meter.times, meter.state_bytes = [time.perf_counter()], reader.bytes()
    while True:
        draft = drafts.propose(min(options.speculate, options.tokens - len(made)))
        rows, taken, before = [logits], [], None
        meter.drafted += len(draft)
        while True:
            place = len(taken)
            drafted = draft[place] if place < len(draft) else None
            token = picker.token(rows[place], drafted)
            ends = picker.take(token)
            if ends != "end":
                made.append(token)
                taken.append(token)
                drafts.add(token)
                emit(token)
                meter.times.append(time.perf_counter())
            meter.accepted += token == drafted
            if ends or len(made) == options.tokens:
                meter.stopped = ends or "tokens"
                meter.complete = grammar is None or grammar.complete
                return made
            if token != drafted or place + 1 == len(draft):
                break
            if not place:  # the first of the draft needs no forward: the others are read together now
                before = reader.copy()
                rows += reader.read(draft, len(draft))
                meter.forwards += 1
        if before is not None and taken == draft:
            logits = rows[-1]
        else:
            reader = before or reader
            logits = reader.read(taken, 1)[0]
            meter.forwards += 1
        meter.state_bytes = max(meter.state_bytes, reader.bytes())


def generate(held: Held, prompt_tokens: list[int], options: Options, emit: Callable[[int], None],
             meter: Meter | None = None, say: Callable[[str], None] = lambda line: None) -> list[int]:
    """The tokens that the model makes behind a prompt that begins with BOS, without the BOS that ends them; `emit` gets
    each when it is settled, `say` lines for a person. Raises ConfigError and CheckError for a grammar."""
    grammar = None if options.grammar == "none" else Grammar(options.grammar, held.tokenizer)
    return continue_text(make_reader(held, options.mode, say), prompt_tokens, options, emit, grammar, meter)


class Spelling:
    """Text from tokens as they come, as far as no later token can change it: whole characters, and letters with the
    case that CaseOps' control characters before them say."""

    def __init__(self, tokenizer: Any) -> None:
        self.table, self.cased = prepare.piece_bytes(tokenizer), prepare.has_caseops(tokenizer)
        self.characters = codecs.getincrementaldecoder("utf-8")("replace")
        self.word, self.told = "", 0  # encoded text from the last certain place on; how much of it was given out

    def feed(self, tokens: Iterable[int]) -> str:
        """What these tokens add."""
        return self._add(self.characters.decode(b"".join(self.table[token] for token in tokens)))

    def finish(self) -> str:
        """What is left at the end: a character that never became whole, as U+FFFD."""
        return self._add(self.characters.decode(b"", final=True))

    def _add(self, text: str) -> str:
        if not self.cased:
            return text
        self.word += text
        found = caseops.decode(self.word, strict=False)
        new = found[self.told:]
        # Behind anything but a letter or a control character nothing is pending, so decoding can begin there.
        cut = max((at for at, character in enumerate(self.word, 1) if character not in caseops.CONTROLS
                   and not (character.isascii() and character.isalpha())), default=0)
        self.word = self.word[cut:]
        self.told = len(caseops.decode(self.word, strict=False))
        return new


# ---- the command


def measure(meter: Meter, held: Held) -> dict[str, Any]:
    """The numbers of a report. Speeds are without the first token, which the prompt's forward gives."""
    count, times = len(meter.times) - 1, meter.times
    marks = [1 + (count - 1) * part // INTERVALS for part in range(INTERVALS + 1)]  # the first costs no forward
    rates = [(end - begin) / max(1e-9, times[end] - times[begin]) if end > begin else None
             for begin, end in zip(marks, marks[1:], strict=False)] if count else [None] * INTERVALS
    seconds = times[-1] - times[min(1, count)]
    parts = [*held.model.parameters(), *held.model.buffers()]
    return {"prompt_tokens": meter.prompt_tokens, "prompt_seconds": meter.prompt_seconds,
            "prompt_tokens_per_second": meter.prompt_tokens / max(1e-9, meter.prompt_seconds),
            "tokens": count, "seconds": seconds, "marks": marks,
            "tokens_per_second": (count - 1) / max(1e-9, seconds) if count > 1 else None, "intervals": rates,
            "forwards": meter.forwards, "drafted": meter.drafted, "accepted": meter.accepted,
            "model_bytes": sum(part.numel() * part.element_size() for part in parts),
            "state_bytes": meter.state_bytes, "peak_bytes": gpt.peak_memory_bytes(held.model.tok_emb.device)}


def report_text(found: dict[str, Any]) -> str:
    """A report for a terminal."""
    marks = found["marks"]
    rows = [["prompt", found["prompt_tokens"], found["prompt_seconds"], found["prompt_tokens_per_second"]],
            ["text", found["tokens"], found["seconds"], found["tokens_per_second"]]]
    rows += [[f"from token {begin}", end - begin, (end - begin) / rate, rate] for begin, end, rate in
             zip(marks, marks[1:], found["intervals"], strict=False) if rate]
    lines = [table_text({"what": "", "tokens": ",", "seconds": ".3f", "tokens a second": ",.1f"}, rows),
             f"forwards {found['forwards']}, drafted {found['drafted']}, taken of them {found['accepted']}"]
    lines.append(", ".join(f"{name} {found[f'{name}_bytes']:,} bytes" for name in ("model", "state", "peak")))
    return "\n".join(lines)


def say(line: str) -> None:
    """A line for a person, on standard error."""
    print(line, file=sys.stderr, flush=True)


def show(text: str) -> None:
    """A part of the text, on standard output at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def run(words: Words) -> None:
    """Load, make the text, show it; CheckError where the grammar was not satisfied."""
    options = words.options
    held = load(words.folder, words.settings, options.packed)
    for line in held.lines:
        say(line)
    prompt, spelling, meter = encode_prompt(held.tokenizer, words.prompt), Spelling(held.tokenizer), Meter()
    parts: list[str] = []
    if options.grammar == "none":
        spelling.feed(prompt)  # what follows may finish its last word; a grammar begins with what is made

    def tell(text: str) -> None:
        parts.append(text)
        if not options.json:
            show(text)

    made: list[int] = []

    def emit(token: int) -> None:
        made.append(token)
        tell(spelling.feed([token]))

    fault = None
    try:
        generate(held, prompt, options, emit, meter, say)
    except gpt.CheckError as error:  # what there is of the text is given out whole
        fault, meter.stopped = error, "fault"
    tell(spelling.finish())
    found = measure(meter, held) if options.report else None
    if options.json:
        show(json.dumps({"prompt": words.prompt, "text": "".join(parts), "tokens": made, "stopped": meter.stopped,
                         **({"report": found} if found else {})}, ensure_ascii=False))
    show("\n")
    if found and not options.json:
        say(report_text(found))
    if fault:
        raise fault
    if not meter.complete:
        raise gpt.CheckError(f"GRAMMAR={options.grammar}: TOKENS={options.tokens} ended before the text was complete")


def help_text() -> str:
    """The help: this module's text and the options."""
    def default(value: Any) -> str:
        return str(int(value) if isinstance(value, bool) else value)

    return (__doc__ or "") + "\n".join(f"    {name:<12}{field.metadata['text']} [{default(field.default)}]"
                                       for name, field in OPTIONS.items())


def main(argv: list[str], environ: Mapping[str, str]) -> int:
    """The command line and the environment; returns the exit code."""
    if {"-h", "--help"} & set(argv):
        print(help_text())
        return 0
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(encoding="utf-8", errors="replace")
    try:
        run(parse(argv, environ))
        return 0
    except (UsageError, gpt.ConfigError) as error:
        say(str(error))
        return 2
    except torch.OutOfMemoryError as error:
        say(f"out of GPU memory ({str(error).splitlines()[0]}); COMPUTE_DTYPE=bfloat16 halves the model")
        return 2
    except gpt.CheckError as error:
        say(str(error))
        return 3
    except BrokenPipeError:  # the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.environ))
