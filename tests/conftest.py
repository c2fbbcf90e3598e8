"""What all tests share: synthetic data made by the project's own tool, small configurations, launches of two ranks."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "data"))

import prepare  # noqa: E402

import train_gpt  # noqa: E402

torch.set_num_threads(1)

MINI_VOCAB = 384
# Small enough for seconds; everything else is the preset's own.
SMALL = {"OVERLAY": "tiny", "VOCAB_SIZE": str(MINI_VOCAB), "MODEL_DIM": "32", "NUM_HEADS": "2", "NUM_KV_HEADS": "1",
         "ROPE_DIMS": "8", "TRAIN_SEQ_LEN": "64", "TRAIN_SEQ_SCHEDULE": "", "TRAIN_BATCH_TOKENS": "512",
         "MICRO_BATCH_TOKENS": "128",
         "EVAL_SEQ_LEN": "64", "EVAL_STRIDE": "32", "EVAL_BATCH_TOKENS": "1024", "COMPUTE_DTYPE": "float32",
         "MAX_WALLCLOCK_SECONDS": "0", "COMPILE": "0", "PACK": "0", "TENSORBOARD": "0", "THREADS": "1",
         "VAL_LOSS_EVERY": "0", "TTT_DOWN_LR": "0", "BIGRAM_VOCAB_SIZE": "0"}


SIZES: dict[str, int] = {}


@pytest.fixture(autouse=True, scope="session")
def counted_once() -> Iterator[None]:
    """Runs in this process count the script's bytes. Packing takes seconds, so all of them count the packed file of the
    first one here, whose size is nearly theirs. Packing itself is tested by itself, and by launches."""
    code_bytes = train_gpt.Run.code_bytes.func

    def counted(run: train_gpt.Run) -> int:
        if not (Path(run.config.run.tools_path) / "pack.py").exists():
            return code_bytes(run)
        if train_gpt.__file__ not in SIZES:
            SIZES[train_gpt.__file__] = code_bytes(run)
        return SIZES[train_gpt.__file__]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_gpt.Run, "code_bytes", property(counted))
        yield


# What an evaluator needs of a model beside what every one has.
FITTING = {"valve": {"STACK": "A (A)*1..4~2", "LOOP_STATE": "exact", "LOOP_SKIPS": 0}}


def synthetic_documents(count: int, seed: int) -> list[str]:
    """Texts with repeated words, so that a few steps of training lower the loss; some characters are rare."""
    rng = random.Random(seed)
    letters = "abcdefghijklmnoprstuvw"
    words = ["".join(random.Random(f"word {i}").choices(letters, k=2 + i % 6)) for i in range(120)]
    weights = [1 / (1 + i) for i in range(len(words))]
    documents = []
    for number in range(count):
        lines = [" ".join(rng.choices(words, weights, k=rng.randint(4, 14))).capitalize() + "."
                 for _ in range(rng.randint(3, 40))]
        documents.append("\n".join(lines) + f"\n{number} \u00e9\u4e2d\U0001f600\n")
    return documents


@pytest.fixture(scope="session")
def mini(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small lossless dataset folder: 120 training and 12 validation documents, made by data/prepare.py."""
    folder = tmp_path_factory.mktemp("data")
    text = folder / "mini.jsonl"
    text.write_text("".join(json.dumps({"text": document}) + "\n" for document in synthetic_documents(132, 7)))
    done = prepare.main(["--data-dir", str(folder), "text", str(text), "--name", "mini", "--vocab-size",
                         str(MINI_VOCAB), "--val-docs", "12"], {})
    assert done == 0
    return folder / "datasets" / f"mini_sp{MINI_VOCAB}"


def small_words(dataset: Path | str, runs: Path | str, **more: object) -> list[str]:
    """NAME=value words of a run that takes seconds."""
    return [f"{name}={value}" for name, value in
            {**SMALL, "DATA_PATH": dataset, "RUNS_PATH": runs, **more}.items()]


def small_config(**more: object) -> train_gpt.Config:
    """A configuration for tests that never touch data or a run folder."""
    return train_gpt.load_config(small_words("none", "none", **more), {}, gpus=0)


class Pieces:
    """A tokenizer of given pieces."""

    def __init__(self, pieces: list[str]) -> None:
        self.pieces = pieces

    def vocab_size(self) -> int:
        return len(self.pieces)

    def id_to_piece(self, token: int) -> str:
        return self.pieces[token]

    def is_control(self, token: int) -> bool:
        return token == train_gpt.BOS

    def is_unknown(self, token: int) -> bool:
        return False

    is_unused = is_unknown

    def is_byte(self, token: int) -> bool:
        return self.pieces[token].startswith("<0x")


PIECES_OF_TEXT = ["<pad>", "<s>", "a", "\u2581(", ")", "[", "]", "{", "}", "\u201c", "\u201d", '"', "<0x0A>", "```",
                  "-", "\u2581*", "1.", "))", '),"', "([", ")(", "b\n\n", "\nx", "`\n- ", "c", "d", "e", "f",
                  "<0x28>", '\n"', "((", "d"]


def make_model(config: train_gpt.Config, seed: int = 0, shake: float = 0.0) -> train_gpt.GPT:
    """The configured model on the CPU in its compute dtype; `shake` adds noise to every parameter, so that branches
    that start at zero take part."""
    kernels, _ = train_gpt.pick_kernels(config.system.kernels, torch.device("cpu"), settings=config.model)
    dtype = train_gpt.pick_dtype(config.system.compute_dtype, torch.device("cpu"))
    model = train_gpt.GPT(config.model, config.data.vocab_size, kernels, dtype)
    train_gpt.init_weights(model, seed)
    if model.grammar is not None:
        pieces = [PIECES_OF_TEXT[token % len(PIECES_OF_TEXT) if token > 1 else token]
                  for token in range(config.data.vocab_size)]
        model.grammar.facts.copy_(torch.from_numpy(model.grammar.facts_of(Pieces(pieces))))
    if shake:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += shake * torch.randn(parameter.shape, generator=generator)
    return model


def launch(words: list[str], processes: int = 1, timeout: int = 240, env: dict | None = None
           ) -> subprocess.CompletedProcess:
    """Runs train_gpt.py in fresh processes from the repository root; two and more go through tools/launch.py."""
    command = [sys.executable]
    if processes > 1:
        command += ["tools/launch.py", "--standalone", "--nproc_per_node", str(processes)]
    return subprocess.run([*command, "train_gpt.py", *words], cwd=ROOT, capture_output=True, text=True,
                          timeout=timeout, env={**clean_env(), **(env or {})})


def clean_env() -> dict[str, str]:
    """The environment without anything that is a setting of ours."""
    known = {*train_gpt.SETTINGS, *train_gpt.RENAMED}
    return {name: value for name, value in os.environ.items() if name not in known}


def events(folder: Path, kind: str) -> list[dict]:
    """The lines of one kind of a run's events.jsonl."""
    lines = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == kind]
