"""What of a published plan is realised here, how, what is not, and why.

    ./run.sh --explain chimera

A row a group of keys of the published configuration; what is built names the settings, rows of STACK or commands that
do it. tests/test_explain.py keeps the names in step with the code.
"""

from __future__ import annotations

import sys
import textwrap
from typing import NamedTuple

BUILT, PART, LEFT_OUT = "built", "in part", "not built"
WIDTHS = (34, 10, 72)


class Row(NamedTuple):
    """A group of keys: its name there, the verdict, how it is realised or why it is not, and the settings that say so
    (those with a value are the preset's own)."""
    keys: str
    verdict: str
    text: str
    settings: tuple[str, ...] = ()


TABLES: dict[str, tuple[Row, ...]] = {"chimera": (
    Row("hidden_size, layers, heads", BUILT, "width 768, eight heads, eight blocks of which twelve visits are made on "
        "average: what 16,000,000 bytes hold of ternary weights", ("MODEL_DIM", "NUM_HEADS", "STACK")),
    Row("hidden_act swiglu", LEFT_OUT, "squared ReLU is better a byte in the challenge's own ablation", ("MLP_ACT",)),
    Row("initializer_range", PART, "normal with deviation 0.02 instead of 0.006: ternary weights have no scale, but "
        "Muon's steps do", ("MATRIX_INIT",)),
    Row("rms_norm_before_every_linear", BUILT, "norms before the matrices that end a branch, too", ("EXTRA_NORMS",)),
    Row("vocab, token_ids", LEFT_OUT, "200,073 tokens would cost many times the cap; 8,192 instead", ("VOCAB_SIZE",)),
    Row("max_position", PART, "the length of training rows; recurrent mixers have no positions", ("TRAIN_SEQ_LEN",)),
    Row("tie_word_embeddings", BUILT, "one embedding in fp8 through factors", ("EMBED_DIM", "EMBED_FORMAT")),
    Row("quantization: method, group", BUILT, "ternary in groups of 128, scale the mean of what is not zero, the loss "
        "taken at the stored weights from the first step",
        ("MATRIX_FORMAT", "GROUP_SIZE", "TERNARY_SCALE", "QAT_START")),
    Row("quantization: activation_bits", BUILT, "inputs of a block's matrices on 255 steps a token (of 64 channels); "
        "off in the preset, it saves no byte", ("ACT_INT8",)),
    Row("quantization: runtime_kernel", LEFT_OUT, "lookup tables of an inference engine; training multiplies in bf16"),
    Row("quantization: sherry_mode", BUILT, "one zero in every four weights, 1.25 bits; off", ("MATRIX_FORMAT",)),
    Row("quantization: hgf_correction", BUILT, "a gated low-rank path in fp8 beside every matrix; off", ("HGF_RANK",)),
    Row("backbone: layer_pattern", BUILT, "mixers by letter, G gated delta rule, X mLSTM, T Titans, K span knot, "
        "A attention, of which three stay: without any, the challenge's hybrids lose below 8,000 tokens", ("STACK",)),
    Row("backbone: kv_cache none", BUILT, "./run.sh generate reads a text in pieces: recurrent mixers hold a state "
        "that does not grow, attention its keys and values"),
    Row("gated_deltanet", BUILT, "the gated delta rule in chunks, K 64 and V 128 a head",
        ("EXPAND_K", "EXPAND_V", "MIXER_CHUNK")),
    Row("efla", BUILT, "the exact step; off", ("EFLA",)),
    Row("xlstm", BUILT, "the max-stabilised matrix memory, letter X", ("STACK",)),
    Row("titans", BUILT, "linear or deep memory, as a layer or as context with persistent slots, letter T; off",
        ("TITANS_DEPTH", "TITANS_CONTEXT", "PERSISTENT_SLOTS")),
    Row("tsp_span_knot", BUILT, "letter K: a gated delta rule with a binary code beside its output, which one "
        "relaxation changes in about two bits of a hundred at most, by three of its five energies: agreement with the "
        "state, with the codes of the last 64 tokens and with the last code. Published are weights, but neither bits "
        "nor turns; off", ("KNOT_BITS",)),
    Row("moe", BUILT, "a feed-forward in parts at equal bytes: some for every token, experts chosen by sigmoid scores, "
        "balanced by biases without a loss, tokens sorted by expert and none dropped; off",
        ("MOE_EXPERTS", "MOE_TOPK", "MOE_SHARED", "MOE_GAMMA")),
    Row("looping", BUILT, "a state that fades below 1 by construction, exact hold or Euler, passes drawn for each row, "
        "gradients through the last half", ("LOOP_STATE", "STACK")),
    Row("looping: adaptive_exit", BUILT, "in evaluation each position leaves by itself when a pass changes it by "
        "less than a share, so that the past alone decides; it matters from three passes on and saves no work: later "
        "tokens may take more passes and read what this one is there; off", ("LOOP_EXIT", "EVAL_PASSES")),
    Row("span_inference", PART, "./run.sh generate SPECULATE=n drafts what followed the text's own end before and "
        "reads a draft in one forward, with the same distribution; no bank, no tree, and nothing of it moves a score"),
    Row("grammar, debt_ledger", PART, "what is open, brackets, quotes, code, lists, is a learned bias of the logits; "
        "off. ./run.sh generate GRAMMAR=json, brackets or a file masks what cannot follow. As published both were a "
        "constant on all logits, which softmax takes out again; rhythm, paragraphs and the other obligations are not "
        "there", ("GRAMMAR_BIAS",)),
    Row("semantic_memory", PART, "binary codes of final states find the earlier ones of the document that are most "
        "like them, and what followed those is added; off. Nothing is kept from document to document",
        ("RETRIEVAL_BITS", "RETRIEVAL_TOP")),
    Row("entropy_valve", BUILT, "an evaluator that gives each chunk of a document one, two or four passes by the "
        "mean entropy of the chunk before; the other five metrics are defined nowhere", ("VALVE_PASSES", "VALVE_BITS")),
    Row("self_evolution: ttt", BUILT, "the closed-form update of the second feed-forward matrix, chunk by chunk, anew "
        "for each document, as part of the forward; off. Adapters of each document that learn behind the score "
        "(EVAL=ttt)",
        ("INPLACE_LAYERS", "INPLACE_LR", "INPLACE_CHUNK", "INPLACE_MOMENTUM", "INPLACE_DECAY", "TTT_SITES")),
    Row("self_evolution: loop_depth_learning", LEFT_OUT, "exit and valve choose the depth; a head that predicts it "
        "would save passes, not bits"),
    Row("self_evolution: the rest", LEFT_OUT, "guidelines, cases, feedback and span growth need a critic or generated "
        "text; they predict nothing that is scored"),
    Row("braid_state", PART, "recurrent states and convolutions are the state; sketches and entity tables are not"),
    Row("modes, generation", BUILT, "./run.sh generate: temperature, top-p, repetition, streaming, one, two or four "
        "passes by MODE, ternary matrices in two bits a weight"),
    Row("training phases", PART, "pretraining, with context that grows; tuning on answers is another task",
        ("TRAIN_SEQ_SCHEDULE",)),
    Row("byte_level", LEFT_OUT, "byte models of the challenge are 0.07 bits behind its token models"),
    Row("deployment, memory_budget, files", LEFT_OUT, "product plumbing; the artifact's container is its own"),
    Row("diagnostics", BUILT, "logged: means of the delta rules' gates, imbalance of experts, mean passes, zeros, bits "
        "and churn of trits, what is added before each pass; what learning at test time gains is the difference of two "
        "scores", ("VAL_LOSS_EVERY", "TRAIN_LOG_EVERY")),
    Row("context_tiers", PART, "attention's window, recurrent state, adapters of test-time training"),
    Row("multimodal", LEFT_OUT, "no such data, and bytes that text needs"),
    Row("safety", LEFT_OUT, "guards of a chat program"),
    Row("P3_ternary_compute", PART, "MeZO with a replay log, straight-through ternary training; masking gradients near "
        "zero is harmful by design and left out", ("MATRIX_OPTIMIZER", "MEZO_EPS_TERNARY")))}


def text(name: str) -> str:
    """The table of a preset for a terminal; KeyError for one without."""
    lines = [f"{name}: what of the published configuration is realised", ""]
    for row in TABLES[name]:
        told = f"{row.text}" + (f" [{', '.join(row.settings)}]" if row.settings else "")
        keys, parts = textwrap.wrap(row.keys, WIDTHS[0]), textwrap.wrap(told, WIDTHS[2])
        for at in range(max(len(keys), len(parts))):
            cells = (keys[at] if at < len(keys) else "", row.verdict if not at else "",
                     parts[at] if at < len(parts) else "")
            lines.append("  ".join(cell.ljust(width) for cell, width in zip(cells, WIDTHS, strict=True)).rstrip())
    count = {verdict: sum(row.verdict == verdict for row in TABLES[name]) for verdict in (BUILT, PART, LEFT_OUT)}
    return "\n".join([*lines, "", ", ".join(f"{number} {verdict}" for verdict, number in count.items())])


def main(argv: list[str]) -> int:
    """Returns 0, 2 for a mistake of the user."""
    if len(argv) != 1 or argv[0] not in TABLES:
        print(f"--explain {' '.join(argv)}: must be one of {', '.join(TABLES)}", file=sys.stderr)
        return 2
    print(text(argv[0]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
