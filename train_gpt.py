"""Sixteen: train a language model, squeeze it into 16,000,000 bytes, score it honestly in bits per byte.

One file for the "16 MB challenge" (Parameter Golf). Everything that counts as code in the artifact is here; pictures,
yardsticks and packing come from tools/, data preparation from data/. Settings are environment variables or NAME=value
words:

    ./run.sh                                                    the main job, with all its set-up
    python train_gpt.py PRESET=baseline OVERLAY= --plan         what would be trained: no data, no GPU, no training
    torchrun --standalone --nproc_per_node=8 train_gpt.py       eight GPUs

Sections, in order; each uses only what stands above it:

    01 IMPORTS      standard library, numpy, torch; nothing optional
    02 SETTINGS     every setting once: default, unit, bounds, one line of help
    03 PRESETS      the systems as rows, the overlays, and how a configuration is resolved
    04 RUNTIME      ranks, clocks, random streams, the log, atomic files
    05 DATA         shards, the manifest, token streams, batches, bytes per token, counts of n-grams
    06 KERNELS      one record an operation: plain reference, fast twin, when the twin is usable
    07 FORMATS      float tensor <-> integer codes and scales; who gets which; the solvers of the codes
    08 LAYERS       linear with sites, rotary, attention and its gates, recurrent mixers, parts that read tokens
    09 MODEL        the layer plan, the block, the one forward, parameter roles
    10 OPTIMIZERS   Muon and AdamW as pure updates, the role table, schedules, weight averaging
    11 TRAINING     compile, warm up, step, log, checkpoint, stop
    12 ARTIFACT     range coder and codecs, container, calibration, squeeze, fit to the cap, forecast
    13 EVALUATORS   plans, the ledger, the guests that predict, the referee that scores them, bits per byte
    14 MAIN         stages, the run folder, the command line, exit codes

Letters in shapes: B batch, T time, D width, H query heads, K key/value heads, C head channels, F feed-forward width,
V vocabulary, N visits, R rank; in recurrences K and V are a head's key and value channels, N chunks of C tokens.
Units: tokens, bytes, seconds, nats (natural log), bits per byte (BPB).
"""

# ==== 01 IMPORTS ============================================================================================
# Only what every run needs. Optional libraries (sentencepiece, compressors, TensorBoard) are imported inside
# the function that uses them, so that importing this file does nothing and needs nothing else.

import contextlib
import copy
import dataclasses
import difflib
import errno
import fnmatch
import functools
import hashlib
import heapq
import importlib.util
import io
import itertools
import json
import lzma
import math
import os
import pickle
import platform
import re
import shutil
import statistics
import struct
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import types
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# ==== 02 SETTINGS ===========================================================================================
# A setting is declared once, here: default, bounds or choices, unit, one line of help. Parsing, validation,
# --help, the printed difference and the README's table are generated from the declaration. This section never
# reads the environment. To add a setting: add a field to a group, read it where it acts, and a rule to RULES
# if it can contradict another one; a test fails for a setting that nothing reads.

LIMIT_BYTES = 16_000_000


class ConfigError(Exception):
    """A user's mistake: the message is one or more lines, each with name, value and rule. Exit code 2."""


class CheckError(Exception):
    """A check that failed while the input was fine (size, budget, legality, divergence). Exit code 3."""


def setting(default: Any, text: str, *, unit: str = "", low: float | None = None, high: float | None = None,
            choices: tuple[str, ...] = (), scope: str = "recipe") -> Any:
    """A dataclass field that declares one setting.

    `scope` says where the value belongs: `recipe` is baked into the packed file and inherited through FROM, `place`
    (paths) and `seed` are inherited but not baked, `run` concerns one launch only.
    """
    meta = {"text": text, "unit": unit, "low": low, "high": high, "choices": choices, "scope": scope}
    return dataclasses.field(default=default, metadata=meta)


def group(cls: type) -> type:
    """The class as a frozen, keyword-only dataclass: one group of settings."""
    return dataclasses.dataclass(frozen=True, kw_only=True)(cls)


GROUP_TEXTS = {"run": "what is run, and where its results go", "data": "tokens", "model": "the network",
               "optim": "optimizers and schedules", "train": "the loop", "artifact": "the squeeze", "eval": "the score",
               "ttt": "test-time training (EVAL names ttt)", "ngram": "the n-gram mixture (EVAL names ngram)",
               "system": "the machine"}


@group
class RunSettings:
    preset: str = setting("sixteen", "which system: a row of --presets")
    overlay: str = setting("auto", "circumstances: auto (tiny without a GPU), tiny, one_gpu, or empty for none")
    run_id: str = setting("", "name of the run folder; empty makes one from preset and time; an old name resumes",
                          scope="run")
    runs_path: str = setting("./runs", "folder of the run folders", scope="run")
    stages: tuple[str, ...] = setting(("train", "calibrate", "write", "reload", "evaluate", "report"),
                                      "which stages, in order", scope="run",
                                      choices=("train", "calibrate", "write", "reload", "evaluate", "report"))
    from_: str = setting("", "finished run folder whose settings, checkpoint and artifact are used", scope="run")
    seed: int = setting(1337, "random streams are made from this and a purpose", low=0, scope="seed")
    pack: bool = setting(True, "pack the script and run the packed file; 0 runs the readable file and records it",
                         scope="run")
    tools_path: str = setting("./tools", "folder with the packer, the pictures and the yardsticks", scope="run")
    sign_key: str = setting("", "file of an Ed25519 key that signs the run's receipt; one is made where there is none",
                            scope="run")
    tensorboard: bool = setting(True, "write live curves for TensorBoard into the run folder", scope="run")


@group
class DataSettings:
    data_path: str = setting("./data/datasets/fineweb10B_sp1024", "folder of the shards", scope="place")
    tokenizer_path: str = setting("", "SentencePiece model; empty takes the one the manifest names", scope="place")
    vocab_size: int = setting(1024, "must equal the tokenizer's", unit="tokens", low=16, high=65536)
    doc_isolation: bool = setting(True, "no token attends to another document; 0 is the challenge's published habit")
    shuffle: bool = setting(True, "rows in a random order every epoch; 0 reads the shards in order")


@group
class ModelSettings:
    stack: str = setting("A9", "the blocks and the order of their visits, for example A3 (A3)*3@0.35 A5")
    model_dim: int = setting(512, "width of the residual stream", unit="channels", low=8)
    num_heads: int = setting(8, "query heads", low=1)
    num_kv_heads: int = setting(4, "key/value heads; must divide NUM_HEADS", low=1)
    mlp_mult: float = setting(2.0, "feed-forward width over MODEL_DIM", low=0.0, high=64.0)
    mlp_act: str = setting("relu_sq", "activation of the feed-forward", choices=("relu_sq", "gelu"))
    mlp_slope: float = setting(0.0, "negative slope of the squared leaky ReLU; 0 is squared ReLU", low=0.0, high=1.0)
    extra_norms: bool = setting(False, "an RMS norm before the matrices that end a branch, too")
    act_int8: bool = setting(False, "what enters a block's matrices is rounded to 8 bits, with a scale a token")
    hgf_rank: int = setting(0, "rank of a gated low-rank path, stored as fp8, beside every matrix of a block; 0: none",
                            low=0, high=1024)
    post_norm: bool = setting(False, "an RMS norm with gains behind each block")
    rope_base: float = setting(10000.0, "base of the rotary frequencies", low=1.0)
    rope_dims: int = setting(0, "channels of a head that rotate; 0 is all, -1 is none", unit="channels", low=-1)
    yarn_factor: float = setting(1.0, "slow rotary frequencies are divided by up to this: the longest context over "
                                 "that of training", low=1.0)
    positions: str = setting("none", "what tells a token its place in its document, added to its embedding: a learned "
                             "table, or four features of the place's bits (radial, as published) or five smooth ones",
                             choices=("none", "learned", "radial", "radial_smooth"))
    position_rows: int = setting(1024, "places that are told apart; published radial has 256", unit="tokens", low=2)
    qk_gain_init: float = setting(1.5, "starting gain of the queries, per head", low=0.0)
    norm_eps: float = setting(1e-6, "added to the mean square in every RMS norm", low=0.0, high=1.0)
    unet_skips: bool = setting(True, "skip connections between visits that mirror each other around the middle")
    skip_gates_enabled: bool = setting(False, "skips are mixed in through a learned gate instead of added")
    logit_softcap: float = setting(30.0, "logits are bent into +-this by tanh; 0 leaves them", low=0.0)
    softcap_type: str = setting("tanh", "how they are bent: tanh, or a polynomial of degree 5 that ends at the bound",
                                choices=("tanh", "poly"))
    logit_bias: bool = setting(False, "a learned bias for each token before that")
    asym_logit_rescale: bool = setting(False, "two learned bounds, for logits above and below 0, in its place")
    xsa_last_n: int = setting(0, "the last so many blocks take the part along their own value out of attention", low=0)
    attn_gate: str = setting("none", "gate on the output of each head: from the first GATE_WINDOW channels (sparse, "
                             "output) or all (dense)", choices=("none", "sparse", "dense", "output"))
    sparse_attn_gate_scale: float = setting(1.0, "factor inside the sigmoid of the sparse gate", low=0.0)
    gate_window: int = setting(12, "channels that gates read", unit="channels", low=1)
    smear_gate_enabled: bool = setting(False, "each embedding takes a gated share of the one before, within documents")
    ln_scale: bool = setting(False, "block i multiplies its normalised inputs by 1 / sqrt(i + 1)")
    parallel_start_layer: int = setting(0, "from this block on attention and feed-forward have a residual lane each; "
                                        "0 is none", low=0)
    parallel_final_lane: str = setting("mean", "what goes on where the lanes end", choices=("mean", "attn", "mlp"))
    value_residual: bool = setting(False, "values take a gated share of the first block's")
    ve_layers: str = setting("", "blocks whose values take an embedding of their token, for example 9,10")
    ve_dim: int = setting(128, "its width before its projection", unit="channels", low=1)
    bigram_vocab_size: int = setting(0, "rows of a hashed table of token pairs, added to the embedding; 0 is none",
                                     low=0)
    bigram_dim: int = setting(112, "width of that table", unit="channels", low=1)
    trigram: bool = setting(False, "token triples are looked up in that table too")
    embed_dim: int = setting(0, "width of the tied embedding, projected to MODEL_DIM and back; 0 is MODEL_DIM",
                             unit="channels", low=0)
    tied_embed_init_std: float = setting(0.005, "standard deviation of the embedding at the start", low=0.0)
    ngram_head: bool = setting(False, "a head that weighs the model against n-grams, for NGRAM_GATE=head")
    matrix_init: str = setting("uniform", "start of matrices that do not end a branch (those start at zero)",
                               choices=("uniform", "orthogonal", "gaussian"))
    smear_channels: bool = setting(False, "channels of an embedding take a learned share of the one before, within "
                                   "documents")
    expand_k: float = setting(1.0, "key channels of a recurrent mixer's heads over MODEL_DIM", low=0.0, high=16.0)
    expand_v: float = setting(1.0, "the same for its values", low=0.0, high=16.0)
    conv_size: int = setting(4, "width of the causal convolutions on its queries, keys and values; 0 is none",
                             unit="tokens", low=0, high=64)
    mixer_gate: bool = setting(True, "a gate on its output, a matrix of its own")
    mixer_chunk: int = setting(64, "tokens that its recurrence takes at once; a deep memory learns from so many "
                               "together", unit="tokens", low=1, high=1024)
    allow_neg_eigval: bool = setting(False, "delta rules may write with strength up to 2, which turns a state around")
    efla: bool = setting(False, "delta rules take the exact step for keys of any length, instead of unit keys")
    titans_depth: int = setting(1, "matrices of a Titans memory: 1 is linear and exact, 2 has a hidden layer", low=1,
                                high=2)
    titans_context: bool = setting(False, "what the memory recalls is context for an attention, instead of the output")
    persistent_slots: int = setting(0, "learned keys and values that this attention always sees", low=0, high=4096)
    loop_skips: bool = setting(True, "visits inside ( ) groups take part in UNET_SKIPS")
    loop_instructions: str = setting("none", "what is added before each pass of a ( ) group: a vector (position), or a "
                                     "low-rank product of the stream, at the first pass (static) or at each (flow)",
                                     choices=("none", "position", "static", "flow"))
    inst_dim: int = setting(32, "rank of that product", unit="channels", low=1)
    crawler_loop_rope_scales: tuple[float, ...] = setting((), "rotary frequencies are divided by this, one for each "
                                                          "pass of a ( ) group, the last one for all that follow",
                                                          low=0.001)
    crawler_tap_dim: int = setting(0, "rank in which every pass of a ( ) group reads the blocks before it; 0 is off",
                                   unit="channels", low=0)
    loop_state: str = setting("none", "before each pass of a ( ) group the stream fades and takes in anew what entered "
                              "the group: exact zero-order hold, or Euler's step", choices=("none", "exact", "euler"))
    anchor_dim: int = setting(0, "channels a position that passes of a ( ) group write and later passes read; 0 is off",
                              unit="channels", low=0)
    moe_experts: int = setting(0, "experts into which a feed-forward is split, beside those that every token takes; "
                               "MLP_MULT stays the width of all together; 0 is none", low=0, high=256)
    moe_topk: int = setting(1, "experts that a token chooses", low=1, high=64)
    moe_shared: int = setting(1, "parts of that width, as wide as an expert, that every token takes", low=0, high=64)
    knot_bits: int = setting(256, "binary code beside the output of a span knot, K", unit="bits", low=8, high=4096)
    retrieval_bits: int = setting(0, "binary code of a final state, by which earlier ones of the document are found, "
                                  "and what followed those is added; 0 is off", unit="bits", low=0, high=4096)
    retrieval_top: int = setting(4, "how many are taken", unit="tokens", low=2, high=256)
    grammar_bias: bool = setting(False, "a learned bias of the logits by what the text has left open: brackets, "
                                 "quotes, code, lists")
    inplace_layers: str = setting("", "blocks whose second feed-forward matrix learns from the text as it is read, for "
                                  "example 3,7: in-place test-time training")
    inplace_lr: float = setting(0.3, "how much a token writes into it", low=1e-6, high=100.0)
    inplace_chunk: int = setting(512, "what a chunk writes, the next chunks read", unit="tokens", low=1)
    inplace_momentum: float = setting(0.0, "share of a chunk's writing that the next one repeats", low=0.0, high=0.99)
    inplace_decay: float = setting(1.0, "share of what is written that a chunk leaves", low=0.0, high=1.0)


@group
class OptimSettings:
    matrix_lr: float = setting(0.04, "rate of matrices", low=0.0)
    tied_embed_lr: float = setting(0.05, "rate of the embedding and other tables", low=0.0)
    scalar_lr: float = setting(0.04, "rate of gains and gates", low=0.0)
    muon_momentum: float = setting(0.95, "momentum of Muon", low=0.0, high=0.9999)
    muon_momentum_warmup_start: float = setting(0.85, "momentum at the first step", low=0.0, high=0.9999)
    muon_momentum_warmup_steps: int = setting(500, "steps until the full momentum", unit="steps", low=0)
    matrix_optimizer: str = setting("muon", "update of matrices", choices=("muon", "adamw", "fro", "fro2", "mezo"))
    other_optimizer: str = setting("adamw", "update of everything else", choices=("adamw", "fro", "mezo"))
    fro_alpha: float = setting(0.1, "share of a step of fro and fro2 that is always taken", low=0.0, high=1.0)
    fro_gamma: float = setting(0.8, "how much of the rest their resonance gives", low=0.0, high=10.0)
    mezo_eps: float = setting(1e-3, "mezo probes the loss so far to both sides of a weight, in deviations of its "
                              "normal direction", low=1e-8, high=1.0)
    mezo_eps_ternary: float = setting(0.03, "the same for ternary latents, whose direction has the scale of their "
                                      "group", low=1e-8, high=1.0)
    cags: str = setting("none", "steps of ternary latents grow near the border between two trits where zeros are near: "
                        "of the gradient as published, or of the update", choices=("none", "published", "placed"))
    cags_alpha: float = setting(0.8, "how much", low=0.0, high=10.0)
    moe_gamma: float = setting(1e-3, "step of the biases that balance the load of experts", low=0.0, high=1.0)
    rate_term: float = setting(0.0, "pull of ternary latents near the border towards zero, as a share of the rate: "
                               "fewer bits a trit", low=0.0, high=100.0)
    muon_backend: str = setting("newton_schulz", "iteration that orthogonalises the update",
                                choices=("newton_schulz", "polar_express"))
    muon_backend_steps: int = setting(5, "iterations of it", low=1, high=20)
    muon_row_normalize: bool = setting(False, "rows of the update are normalised before the iteration")
    muon_wd: float = setting(0.0, "decoupled weight decay of matrices", low=0.0)
    embed_wd: float = setting(0.0, "decoupled weight decay of the embedding and other tables", low=0.0)
    wd_taper_start_frac: float = setting(1.0, "from this fraction of training on both decays change, straight to "
                                         "WD_TAPER_FINAL_MULT at the end", low=0.0, high=1.0)
    wd_taper_final_mult: float = setting(1.0, "what is left of them there", low=0.0)
    beta1: float = setting(0.9, "AdamW's first decay", low=0.0, high=0.99999)
    beta2: float = setting(0.95, "AdamW's second decay", low=0.0, high=0.999999)
    adam_eps: float = setting(1e-8, "AdamW's epsilon", low=0.0)
    grad_clip_norm: float = setting(0.0, "global gradient norm after the reduction over ranks; 0 is off", low=0.0)
    warmdown_frac: float = setting(0.0, "last share of training in which the rate falls to MIN_LR", low=0.0, high=1.0)
    warmdown_iters: int = setting(1200, "the same as a number of steps; 0 leaves it to WARMDOWN_FRAC", unit="steps",
                                  low=0)
    min_lr: float = setting(0.0, "floor of the rate, as a share of the full rate", low=0.0, high=1.0)
    ema_decay: float = setting(0.0, "decay of the weight average that is exported; 0 exports the last weights", low=0.0,
                               high=0.99999)


@group
class TrainSettings:
    iterations: int = setting(20000, "steps at most", unit="steps", low=1)
    max_wallclock_seconds: float = setting(600.0, "budget of the training loop; 0 is none", unit="seconds", low=0.0)
    reserve_seconds: float = setting(0.0, "left at the end of the budget for the calibration; 0 measures it in a "
                                     "rehearsal before the clock starts", unit="seconds", low=0.0)
    strict_clock: bool = setting(False, "the budget also holds compilation, warm-up, calibration and writing")
    train_batch_tokens: int = setting(524288, "tokens of one step over all ranks", unit="tokens", low=1)
    micro_batch_tokens: int = setting(65536, "tokens of one forward; the same whatever the number of ranks",
                                      unit="tokens", low=1)
    train_seq_len: int = setting(1024, "tokens of one row; the longest context", unit="tokens", low=2)
    train_seq_schedule: str = setting("", "shorter contexts at first: 1024@0.1,2048@0.7,3072@1 is 1024 until 10 % of "
                                      "training, 2048 until 70 %, then TRAIN_SEQ_LEN=3072")
    seq_change_warmup_steps: int = setting(0, "steps over which the rate rises again after a change of context",
                                           unit="steps", low=0)
    warmup_steps: int = setting(2, "untimed passes on random tokens for each plan and context before the clock starts",
                                low=1)
    train_log_every: int = setting(200, "steps between printed lines", unit="steps", low=1)
    val_loss_every: int = setting(1000, "steps between validations on the float weights; 0 is never", unit="steps",
                                  low=0)
    checkpoint_seconds: float = setting(60.0, "seconds between checkpoints; 0 writes the last one only",
                                        unit="seconds", low=0.0)
    crawler_cadence_early: int = setting(1, "of so many steps one visits ( ) groups in all their passes and the others "
                                         "once, while the rate is above half of the full one; 0: all visit once", low=0)
    crawler_cadence_main: int = setting(1, "the same while the rate is above a fifth", low=0)
    crawler_cadence_late: int = setting(1, "the same below", low=0)
    grad_checkpoint: bool = setting(False, "each visit of a block is computed again on the way back instead of kept: "
                                    "less memory for about a third more work")
    pass_drop: float = setting(0.0, "chance that a pass of a ( ) group is left out of a micro-batch in training",
                               low=0.0, high=0.9)
    reference_run: str = setting("", "finished run folder; the run ends where at 25, 50 or 75 % its loss is more than "
                                 "REFERENCE_MARGIN above that run's", scope="run")
    reference_margin: float = setting(0.02, "of the training loss, over a twentieth of training", unit="nats", low=0.0,
                                      scope="run")
    z_loss: float = setting(0.0, "weight of the mean squared log-sum of the logits in training; no score holds it",
                            low=0.0)
    complement_alpha: float = setting(0.0, "the loss of a target falls with the share that earlier training pairs gave "
                                      "it, down to a tenth; 0 is off", low=0.0, high=1.0)
    sync_check_every: int = setting(500, "steps between checks that all ranks hold the same weights", unit="steps",
                                    low=1)


FORMAT_KINDS = ("int", "uint", "ternary", "binary", "sherry", "fp8", "fp16", "bf16")
AUTO_CODECS = ("context", "range", "zlib", "lzma", "zstd", "brotli")
CODEC_NAMES = (*AUTO_CODECS, "zpaq", "lrzip")


@group
class ArtifactSettings:
    matrix_format: str = setting("int", "grid of a matrix weight: int is symmetric, uint has a zero point",
                                 choices=FORMAT_KINDS)
    embed_format: str = setting("int", "the same for the embedding", choices=FORMAT_KINDS)
    gain_format: str = setting("fp16", "storage of gains and gates", choices=("fp16", "bf16"))
    matrix_bits: int = setting(8, "bits of a matrix weight on an int or uint grid", unit="bits", low=2, high=8)
    embed_bits: int = setting(8, "bits of an embedding weight on an int or uint grid", unit="bits", low=2, high=8)
    group_size: int = setting(0, "inputs that share a scale; 0 is the whole row", unit="weights", low=0, high=65536)
    matrix_clip_sigmas: float = setting(0.0, "grid ends at this many row deviations; 0 uses CLIP_QUANTILE", low=0.0)
    attn_clip_sigmas: float = setting(0.0, "the same for attention's matrices; 0 is MATRIX_CLIP_SIGMAS", low=0.0)
    mlp_clip_sigmas: float = setting(0.0, "the same for the feed-forward's; 0 is MATRIX_CLIP_SIGMAS", low=0.0)
    embed_clip_sigmas: float = setting(0.0, "the same for the embedding; 0 uses CLIP_QUANTILE", low=0.0)
    clip_quantile: float = setting(0.9999984, "grid ends at this quantile of the row's magnitudes", low=0.5, high=1.0)
    ternary_scale: str = setting("absmean", "scale of a ternary group: mean or root mean square of all, or the mean of "
                                 "what is not zero", choices=("absmean", "rms", "nonzero"))
    ternary_tau: float = setting(0.5, "ternary weights below this share of the mean are zero", low=0.0, high=4.0)
    policy: str = setting("", "rows that come before these settings: `*.q.weight: int8 k=14; *.down.weight: int5 "
                          "group=64 solver=nearest codec=brotli`; pattern of names or role, then a format and k, "
                          "group, tau, scale, solver, codec")
    solver: str = setting("nearest", "how codes are chosen: nearest, or gptq against the inputs' second moments",
                          choices=("nearest", "gptq"))
    gptq_calibration_batches: int = setting(16, "micro-batches whose inputs make the Hessians", low=1)
    gptq_calibration_text: str = setting("train", "training rows, or text that the model samples itself",
                                         choices=("train", "self"))
    gptq_sequential: bool = setting(False, "calibrate each block on predecessors that are quantized already")
    loop_aware_gptq: bool = setting(False, "calibrate ( ) groups on what the other blocks make when they are quantized")
    gptq_damping: float = setting(0.01, "share of the mean diagonal that is added to it", low=1e-8, high=1.0)
    gptq_block: int = setting(128, "columns between two updates of the rest", unit="columns", low=1)
    qat_start: float = setting(1.0, "from this fraction of training on the loss is taken at the weights as they will "
                               "be stored; 1 is never", low=0.0, high=1.0)
    qat_kind: str = setting("stored", "these weights, or the weights with uniform noise of one step of their grid",
                            choices=("stored", "noise"))
    qat_parts: str = setting("all", "which parameters QAT_START concerns", choices=("all", "loops"))
    allocate: bool = setting(False, "divide the bits over tensors by what their errors cost the loss")
    rate_rounding: float = setting(0.0, "gptq rounds towards zero where the bits saved are worth the error: 1 is the "
                                   "exchange rate of the grid itself", low=0.0, high=100.0)
    prune_ones: float = setting(0.0, "share of the codes 1 and -1 that become zero, cheapest by Hessian first",
                                low=0.0, high=1.0)
    lqer_rank: int = setting(0, "rank of the stored correction of the quantization error; 0 is off", low=0, high=64)
    lqer_top_k: int = setting(3, "matrices that get it: those where it removes the most error a byte", low=1)
    lqer_asym_group: int = setting(64, "values that share a scale in its right factor", low=1)
    awq_lite_group_top_k: int = setting(0, "column groups, one a matrix at most, on a grid of AWQ_LITE_BITS; 0: off",
                                        low=0)
    awq_lite_group_size: int = setting(64, "columns of such a group", unit="columns", low=1)
    awq_lite_bits: int = setting(8, "bits of its grid", unit="bits", low=3, high=8)
    codec: tuple[str, ...] = setting(("auto",), "lossless coders to try, the smallest result is kept; auto is all that "
                                     "are installed, but zpaq and lrzip only when named",
                                     choices=("auto", *CODEC_NAMES))
    fit: bool = setting(False, "choose the steps so that code plus model ends just below TARGET_BYTES")
    target_bytes: int = setting(LIMIT_BYTES, "code plus model may not be larger", unit="bytes", low=1, high=LIMIT_BYTES)


EVALUATOR_NAMES = ("contiguous", "sliding", "document", "ttt", "ngram", "valve")


@group
class EvalSettings:
    eval: tuple[str, ...] = setting(("contiguous", "sliding"), "evaluators of the artifact", choices=EVALUATOR_NAMES)
    eval_seq_len: int = setting(1024, "window of the evaluators", unit="tokens", low=2)
    eval_stride: int = setting(64, "new targets per window of the sliding evaluator", unit="tokens", low=1)
    eval_batch_tokens: int = setting(65536, "tokens of one forward in evaluation", unit="tokens", low=1)
    eval_budget_seconds: float = setting(600.0, "budget of the evaluators together; 0 is none", unit="seconds", low=0.0,
                                           scope="run")
    audit: bool = setting(False, "try to make each evaluator break the rules, on the artifact and a slice of the "
                          "validation split", scope="run")
    audit_tokens: int = setting(4096, "targets of that slice, in whole documents", unit="tokens", low=2, scope="run")
    eval_passes: int = setting(0, "passes in evaluation of ( ) groups whose passes training draws, at most what it "
                               "draws; 0 is their mean", low=0, high=999)
    loop_exit: float = setting(0.0, "in evaluation a position leaves a ( ) group when a pass changes it by less than "
                               "this share: later passes find it as it was, which saves none of their work; 0 is never",
                               low=0.0, high=1.0)
    valve_passes: tuple[float, ...] = setting((1.0, 2.0, 4.0), "passes that EVAL=valve chooses from for each "
                                              "chunk of a document", low=1, high=999)
    valve_bits: float = setting(2.0, "it takes the first below half this mean entropy of the chunk before, the second "
                                "below it, else the last", unit="bits", low=0.0, high=20.0)
    eval_shrink: bool = setting(False, "where the forecast is over the budget, take settings that fit and keep them",
                                scope="run")


TTT_PARTS = ("q", "k", "v", "o", "attn", "up", "down", "mlp", "head", "embed")


@group
class TTTSettings:
    ttt_sites: tuple[str, ...] = setting(("q", "k", "v", "attn", "mlp", "head"), "projections that get adapters; attn "
                                         "and mlp are paths beside the whole part", choices=TTT_PARTS)
    ttt_lora_rank: int = setting(80, "rank of the adapters, one set a document; 0 is none", low=0, high=4096)
    ttt_lora_alpha: float = setting(144.0, "what an adapter adds is multiplied by this over its rank", low=0.0)
    ttt_lora_lr: float = setting(1e-4, "rate of the adapters", low=0.0)
    ttt_beta1: float = setting(0.0, "first decay of their AdamW", low=0.0, high=0.99999)
    ttt_beta2: float = setting(0.99, "second decay of their AdamW", low=0.0, high=0.999999)
    ttt_weight_decay: float = setting(0.5, "their decoupled weight decay", low=0.0)
    ttt_grad_steps: int = setting(1, "steps on each chunk after its score", low=0, high=100)
    ttt_chunk_size: int = setting(48, "targets that are scored, then learned from", unit="tokens", low=1)
    ttt_short_score_first_steps: str = setting("", "other chunks by document length: 256:8,2000:24 is 8 up to 256 "
                                               "tokens, 24 up to 2000, TTT_CHUNK_SIZE beyond")
    ttt_eval_seq_len: int = setting(2048, "context of test-time training", unit="tokens", low=2)
    ttt_batch_size: int = setting(64, "documents side by side", low=1)
    ttt_polyak_decay: float = setting(0.0, "scores are taken with this running average of the adapters; 0 is off",
                                      low=0.0, high=0.99999)
    ttt_down_lr: float = setting(0.0, "rate at which a document's own copy of the feed-forward's second matrix learns",
                                 low=0.0)
    ttt_warm_start_a: bool = setting(False, "declared: the input halves of the adapters go on to the next document")
    phased_ttt_prefix_docs: int = setting(0, "declared: after the first so many documents the whole model learns from "
                                          "all that are scored", unit="documents", low=0)
    phased_ttt_num_phases: int = setting(1, "parts of that prefix, each followed by such an update", low=1, high=1000)
    global_ttt_lr: float = setting(1e-3, "rate of that update, SGD, falling to 0", low=0.0)
    global_ttt_momentum: float = setting(0.9, "its momentum", low=0.0, high=0.99999)
    global_ttt_chunk_tokens: int = setting(32768, "tokens of one step of it", unit="tokens", low=1)
    global_ttt_epochs: int = setting(1, "passes of it over what is scored", low=1, high=100)
    global_ttt_grad_clip: float = setting(1.0, "norm of its gradient; 0 is off", low=0.0)


MIXER_OUTPUTS = 8
GATE_NAMES = ("learned", "entropy", "multipliers", "cubric", "head", "tilt")


@group
class NgramSettings:
    ngram_gate: str = setting("learned", "how model and n-grams share: learned online, the challenge's gates, a head "
                              "of the model, or the token tilt", choices=GATE_NAMES)
    ngram_eval_order: int = setting(6, "highest order; each from 2 up is an expert", low=2, high=32)
    ngram_chunk_tokens: int = setting(65536, "targets scored between two updates of the counts", unit="tokens", low=1)
    ngram_discount: float = setting(0.5, "what each count gives to the next lower order", low=0.01, high=0.99)
    ngram_eval_min_count: int = setting(2, "counts behind a context before the gates entropy, multipliers and cubric "
                                        "use it", low=1)
    ngram_eval_alpha_min: float = setting(0.05, "their smallest share of the n-grams", low=0.0, high=1.0)
    ngram_eval_alpha_max: float = setting(0.6, "their largest", low=0.0, high=1.0)
    ngram_eval_entropy_center: float = setting(4.0, "the model's entropy at the middle between the two", unit="nats",
                                               low=0.0)
    ngram_eval_entropy_scale: float = setting(2.0, "how sharply the share rises there", low=0.0)
    ngram_entropy_shift: float = setting(0.25, "that middle falls by this with every order", unit="nats", low=0.0)
    ngram_order_mults: tuple[float, ...] = setting((0.3, 0.3, 0.97, 2.0), "factors of the share by order, from 2 up, "
                                                   "the last for all later ones", low=0.0)
    token_order: tuple[float, ...] = setting((16.0,), "orders of the token tilt, rising", low=2, high=64)
    token_threshold: tuple[float, ...] = setting((0.8,), "share of its context that a hint must have, by order",
                                                 low=0.0, high=1.0)
    token_min_count: tuple[float, ...] = setting((1.0,), "counts behind its context, by order", low=1)
    token_boost: float = setting(2.625, "added to the hint's log-odds", unit="nats", low=0.0, high=50.0)
    token_boost_by_share: bool = setting(False, "the boost is multiplied by the hint's share")
    ngram_head_loss: float = setting(0.1, "weight of the mixer head's own loss in training (NGRAM_HEAD)", low=0.0)
    ngram_train_tokens: int = setting(4_000_000, "training tokens whose n-grams are counted for NGRAM_HEAD and "
                                      "COMPLEMENT_ALPHA", unit="tokens", low=1)


def parse_chunk_steps(text: str) -> tuple[tuple[int, int], ...]:
    """`256:8,2000:24` as ((256, 8), (2000, 24)): chunk sizes by the longest document they serve; else ConfigError."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    steps = tuple((int(a), int(b)) for a, b in (part.split(":") for part in parts
                                                if re.fullmatch(r"[1-9]\d{0,8}:[1-9]\d{0,8}", part)))
    if len(steps) != len(parts) or any(a[0] >= b[0] for a, b in itertools.pairwise(steps)):
        raise ConfigError(f"TTT_SHORT_SCORE_FIRST_STEPS={text}: must be length:chunk pairs with rising lengths, for "
                          "example 256:8,2000:24")
    return steps


def parse_seq_schedule(settings: TrainSettings) -> tuple[tuple[float, int], ...]:
    """((fraction of training, tokens of a row), ...) from TRAIN_SEQ_SCHEDULE, first at 0; else ConfigError."""
    text = settings.train_seq_schedule
    pair = r"\s*([1-9]\d{0,8})@(0?\.\d+|1(?:\.0*)?)\s*"
    parts = [re.fullmatch(pair, part) for part in text.split(",")] if text else []
    knots = [(int(part[1]), float(part[2])) for part in parts if part]
    if text and (len(knots) != len(parts) or any(a[1] >= b[1] or a[0] >= b[0] for a, b in itertools.pairwise(knots))
                 or knots[-1] != (settings.train_seq_len, 1.0)):
        raise ConfigError(f"TRAIN_SEQ_SCHEDULE={text}: must be rising length@fraction pairs that end with "
                          f"TRAIN_SEQ_LEN={settings.train_seq_len}@1, for example 1024@0.1,2048@0.7,3072@1")
    return tuple(zip((0.0, *(end for _, end in knots)), (length for length, _ in knots), strict=False)) or (
        (0.0, settings.train_seq_len),)


def parse_layers(text: str, name: str = "VE_LAYERS") -> frozenset[int]:
    """The blocks that a setting names; ConfigError where it is no list of numbers."""
    if not re.fullmatch(r"\s*(\d{1,3}\s*(,\s*\d{1,3}\s*)*)?", text):
        raise ConfigError(f"{name}={text}: must be numbers of blocks with commas between them, or empty")
    return frozenset(map(int, filter(str.strip, text.split(","))))


@group
class SystemSettings:
    compile: str = setting("auto", "torch.compile: auto is on a GPU only", choices=("auto", "0", "1"))
    cuda_graphs: bool = setting(False, "compiled training steps are replayed as CUDA graphs, which pays where they are "
                                "short")
    compute_dtype: str = setting("auto", "dtype of activations and products: auto is bfloat16 where the unit has it, "
                                 "float16 with scaled losses on older GPUs",
                                 choices=("auto", "float32", "bfloat16", "float16"))
    kernels: str = setting("auto", "auto uses the fast twins, reference the plain formulas",
                           choices=("auto", "reference"))
    threads: int = setting(0, "CPU threads of one process; 0 is all cores over the processes", low=0, scope="run")


GROUPS: dict[str, type] = {"run": RunSettings, "data": DataSettings, "model": ModelSettings, "optim": OptimSettings,
                           "train": TrainSettings, "artifact": ArtifactSettings, "eval": EvalSettings,
                           "ttt": TTTSettings, "ngram": NgramSettings, "system": SystemSettings}


def setting_name(field: dataclasses.Field) -> str:
    """The environment variable of a field; a trailing underscore only avoids a Python keyword."""
    return field.name.rstrip("_").upper()


SETTINGS: dict[str, tuple[str, dataclasses.Field]] = {
    setting_name(field): (name, field) for name, cls in GROUPS.items() for field in dataclasses.fields(cls)}

# Names of the challenge's or the seeds' scripts that are called or done otherwise here.
RENAMED: dict[str, str] = {
    "NUM_LAYERS": "write STACK=A9 for nine layers",
    "NUM_LOOPS": "write the loop into STACK, for example A3 (A3)*3@0.35 A5",
    "LOOP_START": "write the loop into STACK", "LOOP_END": "write the loop into STACK",
    "ENABLE_LOOPING_AT": "write the start into STACK: (A3)*3@0.35",
    "TIE_EMBEDDINGS": "the embedding is always tied", "EMBED_LR": "the embedding is tied: TIED_EMBED_LR",
    "HEAD_LR": "the embedding is tied: TIED_EMBED_LR", "ADAM_WD": "gains and gates are never decayed",
    "VAL_BATCH_SIZE": "EVAL_BATCH_TOKENS", "VAL_BATCH_TOKENS": "EVAL_BATCH_TOKENS",
    "GPTQ_RESERVE_SECONDS": "RESERVE_SECONDS", "COMPRESSOR": "CODEC",
    "BITNET_GROUP_SIZE": "GROUP_SIZE", "LATE_QAT_THRESHOLD": "QAT_START, a fraction of training", "QAT_ENABLED":
    "QAT_START", "LQER_ENABLED": "LQER_RANK=0 is off", "AWQ_LITE_ENABLED": "AWQ_LITE_GROUP_TOP_K=0 is off",
    "SKIP_GPTQ": "SOLVER=nearest", "GPTQ_BLOCK_SIZE": "GPTQ_BLOCK", "TARGET_MB": "TARGET_BYTES",
    "LQER_FACTOR_BITS": "the factors are uint2 and int4", "FP_STORAGE": "EMBED_FORMAT", "DATA_DIR": "DATA_PATH",
    "COMPILE_ENABLED": "COMPILE", "MUON_STEPS": "MUON_BACKEND_STEPS", "WEIGHT_DECAY": "MUON_WD and EMBED_WD",
    "CONTROL_TENSOR_NAME_PATTERNS": "roles decide, not names", "EVAL_INCLUDE_TAIL": "the tail is always scored",
    "VAL_DOC_FRACTION": "the whole validation split is always scored",
    "NGRAM_EVAL_MIN_ORDER": "orders begin at 2", "NGRAM_EVAL_BUCKETS": "counts are exact, nothing is hashed",
    "NGRAM_EVAL_ADAPTIVE": "NGRAM_GATE=entropy", "CUBRIC_CADENCE": "NGRAM_GATE=cubric",
    "NGRAM_DIRICHLET": "NGRAM_GATE=learned, on normalised counts", "NGRAM_EVAL_MAX_SECONDS": "EVAL_BUDGET_SECONDS",
    "NGRAM_USE_LEARNED_ALPHA": "NGRAM_HEAD", "TTT_ENABLED": "EVAL names ttt",
    "PHASED_TTT_ENABLED": "PHASED_TTT_PREFIX_DOCS=0 is off",
    "TTT_K_LORA": "TTT_SITES", "TTT_O_LORA": "TTT_SITES: attn is the path beside attention",
    "TTT_MLP_LORA": "TTT_SITES: mlp", "TTT_MASK": "TTT_SITES names what takes part",
    "TTT_LOCAL_LR_MULT": "TTT_LORA_LR", "TTT_SHORT_SCORE_FIRST_ENABLED": "TTT_SHORT_SCORE_FIRST_STEPS, empty is off",
    "TTT_OPTIMIZER": "AdamW with TTT_BETA1, TTT_BETA2", "GLOBAL_TTT_BATCH_SEQS": "GLOBAL_TTT_CHUNK_TOKENS",
    "SPARSE_ATTN_GATE_ENABLED": "ATTN_GATE=sparse", "GATED_ATTN_ENABLED": "ATTN_GATE=dense",
    "ATTN_OUT_GATE_ENABLED": "ATTN_GATE=output", "GATED_ATTN_QUANT_GATE": 'POLICY="*.attn_gate: int8 k=0"',
    "FUSED_CE_ENABLED": "KERNELS=reference takes the plain one", "VE_ENABLED": "VE_LAYERS names the blocks",
    "TRAIN_SEQ_SCHEDULE_MODE": "the schedule follows the fraction of training", "CASEOPS_ENABLED": "DATA_PATH: the "
    "manifest says how bytes are counted", "COMPILE_SHAPE_WARMUP": "every shape is warmed up",
    "SMEAR_GATE_BOS_FIX": "nothing is smeared over a BOS", "ROPE_YARN": "ROPE_BASE",
    "TTT_EVAL_ONLY": "STAGES=evaluate,report with FROM", "PREQUANT_ONLY": "STAGES=train",
    **dict.fromkeys(("USE_CRAWLER", "NUM_FLAT_LAYERS", "NUM_CRAWLER_LAYERS", "CRAWLER_LOOPS", "CRAWLER_MLP_MULT",
                     "DELTA_NET_HEADS"), "write it into STACK: A2 (A{mlp=4} D{mlp=0,heads=4,gate=0})*4 A2"),
    "CRAWLER_QUANT_INT8": 'POLICY="blocks.2.*.weight: int8"', "DELTA_NET_QUANT_INT8": "POLICY",
    "GPTQ_POST_EMA": "the exported weights are calibrated", "GPTQ_CALIB_SAMPLES": "GPTQ_CALIBRATION_BATCHES"}


# Ordinary names of other programs that are near misses of a setting.
ORDINARY_NAMES = {"COMPILER", "STAGE", "THREAD", "NUM_THREADS", "DATAPATH"}


class Config(NamedTuple):
    """A resolved configuration: the groups, and for each setting that differs from its default who set it."""
    run: RunSettings
    data: DataSettings
    model: ModelSettings
    optim: OptimSettings
    train: TrainSettings
    artifact: ArtifactSettings
    eval: EvalSettings
    ttt: TTTSettings
    ngram: NgramSettings
    system: SystemSettings
    origins: dict[str, str]

    def flat(self) -> dict[str, Any]:
        """All settings by upper-case name, in the order of their declaration."""
        return {name: getattr(getattr(self, owner), field.name) for name, (owner, field) in SETTINGS.items()}

    def recipe(self) -> dict[str, Any]:
        """What is the same for every seed and place of an experiment, as JSON values."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in self.flat().items()
                if SETTINGS[name][1].metadata["scope"] == "recipe"}

    def digest(self) -> str:
        """sha256 over recipe and seed: two runs with the same digest on the same data are the same experiment."""
        kept = {"SEED": self.run.seed, **self.recipe()}
        return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def parse_value(name: str, value: Any) -> Any:
    """The typed value of a setting, from text or from JSON; raises ConfigError naming setting, value and rule."""
    field = SETTINGS[name][1]
    meta, kind = field.metadata, field.type
    text = ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value).strip()

    def fail(rule: str) -> ConfigError:
        return ConfigError(f"{name}={text}: {rule}")

    if kind is bool:
        if text not in ("0", "1", "False", "True"):
            raise fail("must be 0 or 1")
        return text in ("1", "True")
    if kind in (int, float):
        try:
            number = int(text) if kind is int else float(text)
            float(number)
        except (ValueError, OverflowError):
            raise fail("must be a whole number" if kind is int else "must be a number") from None
        low, high = meta["low"], meta["high"]
        if not math.isfinite(number) or (low is not None and number < low) or (high is not None and number > high):
            bounds = " and ".join(f"{word} {bound:,}" for word, bound in (("at least", low), ("at most", high))
                                  if bound is not None) or "finite"
            raise fail(f"must be {bounds}{' ' + meta['unit'] if meta['unit'] else ''}")
        return number
    parts = tuple(part.strip() for part in text.split(",") if part.strip()) if kind is not str else (text,)
    if kind == tuple[float, ...]:
        try:
            numbers = tuple(float(part) for part in parts)
        except ValueError:
            raise fail("must be numbers with commas between them") from None
        low, high = (-math.inf if meta["low"] is None else meta["low"]), (
            math.inf if meta["high"] is None else meta["high"])
        if not numbers and field.default or not all(math.isfinite(number) and low <= number <= high
                                                    for number in numbers):
            raise fail(f"must be one number or more from {low:g} to {high:g}")
        return numbers
    for part in parts:
        if meta["choices"] and part not in meta["choices"]:
            raise fail(f"must be {'one' if kind is str else 'some'} of {', '.join(meta['choices'])}")
    if kind is not str and len(set(parts)) != len(parts):
        raise fail("names something twice")
    if kind is not str and not parts:
        raise fail(f"must name at least one of {', '.join(meta['choices'])}")
    return text if kind is str else parts


POLICY_KEYS: dict[str, tuple[str, Callable[[str], Any], str]] = {
    "k": ("sigmas", float, "a number"), "group": ("group", int, "a whole number"),
    "tau": ("tau", float, "a number"), "scale": ("scale", str, "absmean, rms or nonzero"),
    "solver": ("solver", str, "nearest or gptq"), "codec": ("codec", str, ", ".join(CODEC_NAMES))}
POLICY_CHOICES = {"scale": ("absmean", "rms", "nonzero"), "solver": ("nearest", "gptq"), "codec": CODEC_NAMES}


@functools.cache
def parse_policy(text: str) -> tuple[tuple[str, dict[str, Any]], ...]:
    """The rows of POLICY: (pattern, fields of a Route); raises ConfigError naming the row."""
    rows = []
    for row in filter(None, (part.strip() for part in text.split(";"))):
        pattern, colon, words = row.partition(":")
        fields: dict[str, Any] = {}
        if not colon or not pattern.strip() or not words.split():
            raise ConfigError(f"POLICY={row}: must be a pattern, a colon, then a format and key=value words")
        for word in words.split():
            key, equals, value = word.partition("=")
            if not equals:
                if not re.fullmatch("u?int[2-8]|ternary|binary|sherry|fp8|fp16|bf16", word):
                    raise ConfigError(f"POLICY={row}: {word} is not a format: int2 to int8, uint2 to uint8, "
                                      f"{', '.join(FORMAT_KINDS[2:])}")
                fields["format"] = word
                continue
            field, kind, rule = POLICY_KEYS.get(key, ("", str, ""))
            if not field or value not in POLICY_CHOICES.get(key, (value,)):
                raise ConfigError(f"POLICY={row}: {word}: must be " + (rule or f"one of {', '.join(POLICY_KEYS)}"))
            try:
                fields[field] = kind(value)
                if kind is not str and not 0 <= fields[field] < 1e6:
                    raise ValueError
            except ValueError:
                raise ConfigError(f"POLICY={row}: {word}: must be {rule}, not negative") from None
        rows.append((pattern.strip(), fields))
    return tuple(rows)


# Rules between settings: what must hold, and the line to print when it does not.
RULES: tuple[tuple[Callable[[Config], bool], str], ...] = (
    (lambda c: c.model.model_dim % c.model.num_heads == 0,
     "NUM_HEADS={model.num_heads}: must divide MODEL_DIM={model.model_dim}"),
    (lambda c: c.model.model_dim % c.model.num_heads or c.model.num_heads % c.model.num_kv_heads == 0,
     "NUM_KV_HEADS={model.num_kv_heads}: must divide NUM_HEADS={model.num_heads}"),
    (lambda c: c.model.model_dim % c.model.num_heads or (c.model.model_dim // c.model.num_heads) % 2 == 0,
     "NUM_HEADS={model.num_heads}: MODEL_DIM={model.model_dim} over it must be even, rotary embedding turns pairs"),
    (lambda c: c.model.model_dim % c.model.num_heads or (
        c.model.rope_dims == -1 or c.model.rope_dims % 2 == 0 and
        c.model.rope_dims <= c.model.model_dim // c.model.num_heads),
     "ROPE_DIMS={model.rope_dims}: must be even and at most MODEL_DIM / NUM_HEADS, or -1"),
    (lambda c: c.model.softcap_type == "tanh" or c.model.logit_softcap and not c.model.asym_logit_rescale,
     "SOFTCAP_TYPE=poly: needs LOGIT_SOFTCAP above 0 and ASYM_LOGIT_RESCALE=0"),
    (lambda c: c.model.positions in ("none", "radial") or c.model.position_rows >= max(
        c.train.train_seq_len, c.eval.eval_seq_len, c.ttt.ttt_eval_seq_len * bool({"ttt", "valve"} & {*c.eval.eval})),
     "POSITION_ROWS={model.position_rows}: POSITIONS={model.positions} would begin again within "
     "TRAIN_SEQ_LEN={train.train_seq_len}, EVAL_SEQ_LEN={eval.eval_seq_len} or "
     "TTT_EVAL_SEQ_LEN={ttt.ttt_eval_seq_len}"),
    (lambda c: c.optim.cags == "none" and not c.optim.rate_term or c.artifact.qat_start < 1 and (
        c.artifact.matrix_format == "ternary" or "ternary" in c.artifact.policy),
     "CAGS={optim.cags}, RATE_TERM={optim.rate_term}: need ternary weights that are trained as such, MATRIX_FORMAT="
     "ternary and QAT_START below 1"),
    (lambda c: (c.optim.matrix_optimizer == "mezo") == (c.optim.other_optimizer == "mezo"),
     "MATRIX_OPTIMIZER={optim.matrix_optimizer}, OTHER_OPTIMIZER={optim.other_optimizer}: mezo has no gradients to "
     "share, so both must be mezo or neither"),
    (lambda c: not c.train.pass_drop or repeats(c.model.stack) and c.model.loop_state == "none",
     "PASS_DROP={train.pass_drop}: needs a ( ) group with several passes in STACK={model.stack}, and LOOP_STATE=none, "
     "whose state begins with the first of them"),
    (lambda c: c.train.micro_batch_tokens % math.lcm(*(length for _, length in parse_seq_schedule(c.train))) == 0,
     "MICRO_BATCH_TOKENS={train.micro_batch_tokens}: must be a multiple of TRAIN_SEQ_LEN={train.train_seq_len} and of "
     "every length in TRAIN_SEQ_SCHEDULE={train.train_seq_schedule}, together"),
    (lambda c: all(block < len(parse_stack(c.model.stack)[0]) for block in parse_layers(c.model.ve_layers)),
     "VE_LAYERS={model.ve_layers}: names a block that STACK={model.stack} does not have"),
    (lambda c: max(c.model.xsa_last_n, c.model.parallel_start_layer + 1) <= max(1, len(parse_stack(c.model.stack)[0])),
     "XSA_LAST_N={model.xsa_last_n}, PARALLEL_START_LAYER={model.parallel_start_layer}: beyond the blocks of "
     "STACK={model.stack}"),
    (lambda c: not c.model.post_norm or not c.model.parallel_start_layer,
     "POST_NORM=1: PARALLEL_START_LAYER={model.parallel_start_layer} must be 0, lanes have no common stream to norm"),
    (lambda c: c.optim.wd_taper_final_mult == 1 or c.optim.wd_taper_start_frac < 1,
     "WD_TAPER_FINAL_MULT={optim.wd_taper_final_mult}: needs WD_TAPER_START_FRAC below 1, else it never begins"),
    (lambda c: c.model.gate_window <= c.model.model_dim,
     "GATE_WINDOW={model.gate_window}: must be at most MODEL_DIM={model.model_dim}"),
    (lambda c: not c.model.trigram or c.model.bigram_vocab_size,
     "TRIGRAM=1: needs BIGRAM_VOCAB_SIZE, the table it looks into"),
    (lambda c: c.model.bigram_vocab_size != 1,
     "BIGRAM_VOCAB_SIZE={model.bigram_vocab_size}: must be 0 or at least 2, one row is for the first token"),
    (lambda c: not c.model.asym_logit_rescale or c.model.logit_softcap,
     "ASYM_LOGIT_RESCALE=1: needs LOGIT_SOFTCAP, where both bounds start"),
    (lambda c: not (c.model.value_residual or c.model.ve_layers) or all(
        block.letter == "A" and {"num_heads", "num_kv_heads"}.isdisjoint(block.overrides)
        for block in parse_stack(c.model.stack)[0]),
     "VALUE_RESIDUAL={model.value_residual}, VE_LAYERS={model.ve_layers}: all blocks must be attention with the same "
     "heads, STACK={model.stack} has others"),
    (lambda c: not letters_of(c.model.stack).isdisjoint("DGK") or not (c.model.efla or c.model.allow_neg_eigval),
     "EFLA={model.efla}, ALLOW_NEG_EIGVAL={model.allow_neg_eigval}: STACK={model.stack} has no delta rule, D, G or K"),
    (lambda c: "T" in letters_of(c.model.stack) or c.model.titans_depth == 1 and not c.model.titans_context,
     "TITANS_DEPTH={model.titans_depth}, TITANS_CONTEXT={model.titans_context}: STACK={model.stack} has no Titans "
     "memory, T"),
    (lambda c: "K" in letters_of(c.model.stack) or c.model.knot_bits == SETTINGS["KNOT_BITS"][1].default,
     "KNOT_BITS={model.knot_bits}: STACK={model.stack} has no span knot, K"),
    (lambda c: letters_of(c.model.stack) - {"A"} or all(
        getattr(c.model, name) == SETTINGS[name.upper()][1].default
        for name in ("expand_k", "expand_v", "conv_size", "mixer_gate", "mixer_chunk")),
     "EXPAND_K, EXPAND_V, CONV_SIZE, MIXER_GATE, MIXER_CHUNK: STACK={model.stack} has no recurrent mixer that they "
     "concern"),
    (lambda c: "A" in letters_of(c.model.stack) or c.model.attn_gate == "none" and not c.model.xsa_last_n,
     "ATTN_GATE={model.attn_gate}, XSA_LAST_N={model.xsa_last_n}: STACK={model.stack} has no attention, A"),
    (lambda c: len(c.model.crawler_loop_rope_scales) <= max(item.most for item in parse_stack(c.model.stack)[1]),
     "CRAWLER_LOOP_ROPE_SCALES={model.crawler_loop_rope_scales}: more than any ( ) group of STACK={model.stack} has "
     "passes"),
    (lambda c: c.artifact.qat_start < 1 or (c.artifact.qat_kind, c.artifact.qat_parts) == ("stored", "all"),
     "QAT_KIND={artifact.qat_kind}, QAT_PARTS={artifact.qat_parts}: need QAT_START below 1, else they never act"),
    (lambda c: not c.model.persistent_slots or c.model.titans_context,
     "PERSISTENT_SLOTS={model.persistent_slots}: needs TITANS_CONTEXT=1, the attention that sees them"),
    (lambda c: not c.model.titans_context or all(
        own.expand_k == own.expand_v == 1 for block in parse_stack(c.model.stack)[0] if block.letter == "T"
        for own in [own_settings(c.model, block)]),
     "TITANS_CONTEXT=1: memory and attention share keys and values, so EXPAND_K, EXPAND_V and their overrides key and "
     "value must be 1 for every T of STACK={model.stack}"),
    (lambda c: not c.model.efla or not c.model.allow_neg_eigval,
     "EFLA=1: its exact step never exceeds 1, ALLOW_NEG_EIGVAL={model.allow_neg_eigval} would double it"),
    (lambda c: repeats(c.model.stack) or not (c.model.loop_instructions != "none" or c.model.crawler_tap_dim or
                                              c.model.anchor_dim or c.model.crawler_loop_rope_scales),
     "LOOP_INSTRUCTIONS={model.loop_instructions}, CRAWLER_TAP_DIM={model.crawler_tap_dim}, ANCHOR_DIM="
     "{model.anchor_dim}, CRAWLER_LOOP_ROPE_SCALES: STACK={model.stack} has no ( ) group with several passes"),
    (lambda c: c.model.loop_state == "none" or repeats(c.model.stack) and not c.model.parallel_start_layer,
     "LOOP_STATE={model.loop_state}: needs a ( ) group with several passes in STACK={model.stack}, and "
     "PARALLEL_START_LAYER=0"),
    (lambda c: not random_depth(c.model.stack) or c.model.loop_state != "none" and not c.train.pass_drop and (
        cadences(c.train) == {1} and not (c.model.unet_skips and c.model.loop_skips)),
     "STACK={model.stack}: a random number of passes needs LOOP_STATE, which gives what stands before the group its "
     "gradient, PASS_DROP=0, no CRAWLER_CADENCE, and LOOP_SKIPS=0 or UNET_SKIPS=0"),
    (lambda c: not random_depth(c.model.stack) or all(
        len(item.passes) == 1 for item in parse_stack(c.model.stack)[1]),
     "STACK={model.stack}: passes drawn as *least..most~mean are not with a group whose passes change in training"),
    (lambda c: not c.eval.eval_passes or random_depth(c.model.stack) and c.eval.eval_passes <= max(
        item.depth[1] for item in parse_stack(c.model.stack)[1] if item.depth),
     "EVAL_PASSES={eval.eval_passes}: needs a ( ) group in STACK={model.stack} whose passes training draws, so many "
     "at least"),
    (lambda c: not c.eval.loop_exit or c.model.loop_state != "none",
     "LOOP_EXIT={eval.loop_exit}: needs LOOP_STATE, whose passes come to rest"),
    (lambda c: not c.eval.loop_exit or evaluation_passes(c) > 2,
     "LOOP_EXIT={eval.loop_exit}: needs three passes of a ( ) group in evaluation, by STACK={model.stack}, EVAL_PASSES="
     "{eval.eval_passes} or EVAL=valve: who comes to rest in the second leaves the third"),
    (lambda c: "valve" not in c.eval.eval or len(c.eval.valve_passes) == 3 and random_depth(c.model.stack) and all(
        passes == int(passes) for passes in c.eval.valve_passes) and max(
        c.eval.valve_passes) <= max(item.depth[1] for item in parse_stack(c.model.stack)[1] if item.depth),
     "VALVE_PASSES={eval.valve_passes}: EVAL=valve needs three whole numbers, and a ( ) group in STACK={model.stack} "
     "whose passes training draws, as many at least"),
    (lambda c: has_experts(c.model) or not any(experts for _, experts in feed_forwards(c.model)),
     "MOE_EXPERTS={model.moe_experts}, or moe in STACK={model.stack}: no such block has a feed-forward to split"),
    (lambda c: not has_experts(c.model) or c.model.norm_eps > 0 or not c.model.extra_norms,
     "NORM_EPS={model.norm_eps}: must be above 0 with experts and EXTRA_NORMS, which norm rows of zeros"),
    (lambda c: not has_experts(c.model) or c.optim.matrix_optimizer != "mezo",
     "MOE_EXPERTS, or moe in STACK={model.stack}: not with MATRIX_OPTIMIZER=mezo, experts are balanced by gradients"),
    (lambda c: all(EXPERT_STEP <= split_width(c.model, hidden, experts) and c.model.moe_topk < experts
                   for hidden, experts in feed_forwards(c.model) if experts and hidden),
     "MOE_TOPK={model.moe_topk}, MOE_SHARED={model.moe_shared}: a block with experts in STACK={model.stack} must have "
     "more than MOE_TOPK of them, and its MLP_MULT at least 8 channels for each"),
    (lambda c: parse_layers(c.model.inplace_layers, "INPLACE_LAYERS") <= {
        block for block, (hidden, experts) in enumerate(feed_forwards(c.model)) if hidden and (
            c.model.moe_shared or not experts)},
     "INPLACE_LAYERS={model.inplace_layers}: must be blocks of STACK={model.stack} with a feed-forward, and with "
     "MOE_SHARED where they have experts"),
    (lambda c: not c.model.inplace_layers or c.model.inplace_chunk < min(
        *(length for _, length in parse_seq_schedule(c.train)), c.eval.eval_seq_len,
        c.ttt.ttt_eval_seq_len if {"ttt", "valve"} & {*c.eval.eval} else math.inf),
     "INPLACE_CHUNK={model.inplace_chunk}: must be less than every length of rows, TRAIN_SEQ_LEN="
     "{train.train_seq_len}, TRAIN_SEQ_SCHEDULE={train.train_seq_schedule}, EVAL_SEQ_LEN={eval.eval_seq_len} and "
     "TTT_EVAL_SEQ_LEN={ttt.ttt_eval_seq_len}, or nothing is read"),
    (lambda c: c.model.moe_shared or not has_experts(c.model) or not (
        {"up", "down"} & set(c.ttt.ttt_sites) or c.ttt.ttt_down_lr),
     "MOE_SHARED=0: TTT_SITES={ttt.ttt_sites} and TTT_DOWN_LR={ttt.ttt_down_lr} must leave up and down, which are "
     "those of the shared part"),
    (lambda c: not c.model.crawler_tap_dim or 0 not in parse_stack(c.model.stack)[1][0].blocks or
     parse_stack(c.model.stack)[1][0].most == 1,
     "CRAWLER_TAP_DIM={model.crawler_tap_dim}: nothing stands before the first ( ) group of STACK={model.stack}"),
    (lambda c: cadences(c.train) == {1} or repeats(c.model.stack) and not (
        c.model.unet_skips and c.model.loop_skips),
     "CRAWLER_CADENCE_EARLY={train.crawler_cadence_early}, _MAIN, _LATE: need a ( ) group in STACK={model.stack}, and "
     "LOOP_SKIPS=0 or UNET_SKIPS=0, whose skips are the same with one pass"),
    (lambda c: not c.artifact.loop_aware_gptq or repeats(c.model.stack) and c.artifact.solver == "gptq" and
     not c.artifact.gptq_sequential,
     "LOOP_AWARE_GPTQ=1: needs SOLVER=gptq without GPTQ_SEQUENTIAL, and a ( ) group in STACK={model.stack}"),
    (lambda c: c.artifact.qat_parts == "all" or repeats(c.model.stack),
     "QAT_PARTS=loops: STACK={model.stack} has no ( ) group with several passes"),
    (lambda c: c.train.train_batch_tokens % c.train.micro_batch_tokens == 0,
     "TRAIN_BATCH_TOKENS={train.train_batch_tokens}: must be a multiple of "
     "MICRO_BATCH_TOKENS={train.micro_batch_tokens}"),
    (lambda c: c.eval.eval_stride <= c.eval.eval_seq_len,
     "EVAL_STRIDE={eval.eval_stride}: must be at most EVAL_SEQ_LEN={eval.eval_seq_len}"),
    (lambda c: c.eval.eval_batch_tokens >= c.eval.eval_seq_len,
     "EVAL_BATCH_TOKENS={eval.eval_batch_tokens}: must be at least EVAL_SEQ_LEN={eval.eval_seq_len}"),
    (lambda c: c.ttt.ttt_chunk_size <= c.ttt.ttt_eval_seq_len,
     "TTT_CHUNK_SIZE={ttt.ttt_chunk_size}: must be at most TTT_EVAL_SEQ_LEN={ttt.ttt_eval_seq_len}"),
    (lambda c: all(size <= c.ttt.ttt_eval_seq_len for _, size in parse_chunk_steps(c.ttt.ttt_short_score_first_steps)),
     "TTT_SHORT_SCORE_FIRST_STEPS={ttt.ttt_short_score_first_steps}: chunks must be at most "
     "TTT_EVAL_SEQ_LEN={ttt.ttt_eval_seq_len}"),
    (lambda c: not c.model.ngram_head or c.ngram.ngram_eval_order <= MIXER_OUTPUTS,
     "NGRAM_EVAL_ORDER={ngram.ngram_eval_order}: NGRAM_HEAD=1 has room for orders up to 8"),
    (lambda c: "ngram" not in c.eval.eval or c.eval.eval_stride + max(
        c.ngram.ngram_eval_order, *c.ngram.token_order) <= c.eval.eval_seq_len,
     "EVAL_STRIDE={eval.eval_stride}: EVAL=ngram needs room for its orders, NGRAM_EVAL_ORDER="
     "{ngram.ngram_eval_order} and TOKEN_ORDER={ngram.token_order}, beside it in EVAL_SEQ_LEN={eval.eval_seq_len}"),
    (lambda c: len(c.ngram.token_order) == len(c.ngram.token_threshold) == len(c.ngram.token_min_count) and
     all(order == int(order) for order in c.ngram.token_order) and
     all(a < b for a, b in itertools.pairwise(c.ngram.token_order)),
     "TOKEN_ORDER={ngram.token_order}: must be rising whole numbers, with a threshold and a count for each in "
     "TOKEN_THRESHOLD={ngram.token_threshold} and TOKEN_MIN_COUNT={ngram.token_min_count}"),
    (lambda c: (c.ngram.ngram_gate == "head") <= c.model.ngram_head,
     "NGRAM_GATE=head: needs NGRAM_HEAD=1, a model that has the head"),
    (lambda c: not (c.ttt.ttt_down_lr and "down" in c.ttt.ttt_sites),
     "TTT_DOWN_LR={ttt.ttt_down_lr}: the whole matrix learns, so TTT_SITES must not name down"),
    (lambda c: not (c.optim.warmdown_frac and c.optim.warmdown_iters),
     "WARMDOWN_FRAC={optim.warmdown_frac}: WARMDOWN_ITERS={optim.warmdown_iters} says the same; set one to 0"),
    (lambda c: not c.train.max_wallclock_seconds or c.train.reserve_seconds < c.train.max_wallclock_seconds,
     "RESERVE_SECONDS={train.reserve_seconds}: must be less than "
     "MAX_WALLCLOCK_SECONDS={train.max_wallclock_seconds}"),
    (lambda c: bool(re.fullmatch(r"[A-Za-z0-9._-]*", c.run.run_id)) and c.run.run_id not in (".", ".."),
     "RUN_ID={run.run_id}: letters, digits, dots, dashes and underscores only"),
    (lambda c: "auto" not in c.artifact.codec or len(c.artifact.codec) == 1,
     "CODEC={artifact.codec}: auto stands alone, or names stand without it"),
    (lambda c: not (c.artifact.fit and {c.artifact.matrix_format, c.artifact.embed_format}.isdisjoint({"int", "uint"})),
     "FIT=1: needs an int or uint grid, whose steps can be chosen; MATRIX_FORMAT={artifact.matrix_format}"),
    (lambda c: not c.artifact.gptq_sequential or c.artifact.solver == "gptq",
     "GPTQ_SEQUENTIAL=1: needs SOLVER=gptq"),
    (lambda c: not c.run.sign_key or "report" in c.run.stages,
     "SIGN_KEY={run.sign_key}: needs the stage report, which signs"),
    (lambda c: not c.train.reference_run or "train" in c.run.stages,
     "REFERENCE_RUN={train.reference_run}: needs the stage train, which it may end"),
    (lambda c: "train" in c.run.stages or bool(c.run.from_) or bool(c.run.run_id),
     "STAGES: without train, FROM=<run folder> or RUN_ID=<old run> must name the run to use"),
)


def show_value(value: Any) -> str:
    """A setting's value as a user would write it."""
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    return ",".join(map(show_value, value)) if isinstance(value, tuple) else str(value)


def help_text() -> str:
    """--help: commands, then every setting by group, from the declarations."""
    lines = ["train_gpt.py [NAME=value ...] [--help | --presets | --plan]", "",
             "Settings are environment variables or words; words win. Exit codes: 0 done, 2 a mistake in the input,",
             "3 a failed check (size, budget, divergence), 1 a fault of the program.", ""]
    for owner, cls in GROUPS.items():
        lines.append(f"{owner.upper()}: {GROUP_TEXTS[owner]}")
        for field in dataclasses.fields(cls):
            meta = field.metadata
            default = show_value(field.default)
            unit = f" {meta['unit']}" if meta["unit"] else ""
            lines.append(f"  {setting_name(field):<28} {meta['text']} [{default}{unit}]")
            if meta["choices"]:
                lines.append(f"  {'':<28} choices: {', '.join(meta['choices'])}")
        lines.append("")
    return "\n".join(lines)


class Visits(NamedTuple):
    """A run of blocks and when it is visited how often: ((fraction of training, passes), ...), first at 0; whether it
    is a ( ) group; the least, the most and the mean number of passes where training draws it."""
    blocks: tuple[int, ...]
    passes: tuple[tuple[float, int], ...]
    grouped: bool
    depth: tuple[int, int, float] | None = None

    @property
    def most(self) -> int:
        """The most passes it is ever visited in."""
        return self.depth[1] if self.depth else self.passes[-1][1]


class Block(NamedTuple):
    """One physical block: its mixer's letter and its own overrides of the model's settings."""
    letter: str
    overrides: dict[str, Any]


# What {key=value} behind a letter changes: the model's setting, and the letters that have it.
OVERRIDES: dict[str, tuple[str, str]] = {
    "mlp": ("mlp_mult", "ADGXTK"), "moe": ("moe_experts", "ADGXTK"), "heads": ("num_heads", "ADGXTK"),
    "kv": ("num_kv_heads", "A"), "xsa": ("xsa_last_n", "A"), "key": ("expand_k", "DGXTK"),
    "value": ("expand_v", "DGXTK"), "conv": ("conv_size", "DGXTK"), "gate": ("mixer_gate", "DGXTK")}
# Letter -> the operation of KERNELS that mixes positions. A attention, D delta rule, G gated delta rule, X mLSTM,
# T Titans memory (of depth 1; "deep" stands for 2), K span knot on a gated delta rule.
MIXER_KERNELS = {"A": "attention", "D": "delta", "G": "delta", "X": "mlstm", "T": "titans", "K": "delta"}
MAX_BLOCKS, MAX_VISITS, MAX_PHASES = 512, 4096, 8
_STACK_TOKEN = re.compile(r"\s*(?:(?P<letter>[A-Za-z])(?:\{(?P<over>[^}]*)\})?(?P<count>\d*)"
                          r"|(?P<open>[\[(])|(?P<close>[\])])(?P<tail>[0-9.*@~]*))")


def _stack_fault(stack: str, at: int, rule: str) -> ConfigError:
    return ConfigError(f"STACK={stack}: at column {at + 1}: {rule}")


def _parse_passes(stack: str, tail: str, at: int) -> tuple[tuple[float, int], ...]:
    """`*3@0.35` or `*2@0.5*3@0.65` as ((0, 1), (0.35, 3)); `*31` as ((0, 31),)."""
    parts = re.findall(r"\*(\d{1,4})(?:@(\d*\.?\d+))?", tail)
    if not parts or "".join(f"*{n}" + (f"@{f}" if f else "") for n, f in parts) != tail:
        raise _stack_fault(stack, at, "a ( ) group needs *passes, or *passes@fraction, after it")
    knots = [(float(frac) if frac else 0.0, int(passes)) for passes, frac in parts]
    if knots[0][0] > 0:
        knots.insert(0, (0.0, 1))
    rising = all(a[0] < b[0] and a[1] < b[1] for a, b in zip(knots, knots[1:], strict=False))
    if not rising or knots[-1][0] >= 1 or knots[0][1] < 1:
        raise _stack_fault(stack, at, "passes and their fractions must rise, fractions below 1, passes at least 1")
    return tuple(knots)


def _parse_group(stack: str, tail: str, at: int
                 ) -> tuple[tuple[tuple[float, int], ...], tuple[int, int, float] | None]:
    """The passes of a ( ) group, and for `*1..4~2` how training draws them: from 1 to 4, on average 2, which is also
    how many there are in evaluation."""
    drawn = re.fullmatch(r"\*([1-9]\d{0,2})\.\.([1-9]\d{0,2})~(\d{1,3}(?:\.\d+)?)", tail)
    if drawn is None:
        return _parse_passes(stack, tail, at), None
    least, most, mean = int(drawn[1]), int(drawn[2]), float(drawn[3])
    if not least <= mean <= most:
        raise _stack_fault(stack, at, "passes drawn as *least..most~mean must have least <= mean <= most")
    return ((0.0, round(mean)),), (least, most, mean)


def _parse_block(stack: str, letter: str, over: str | None, at: int) -> Block:
    """One block from its letter and the text between its braces."""
    if letter not in MIXER_KERNELS:
        raise _stack_fault(stack, at, f"{letter} is not a mixer; known: {', '.join(MIXER_KERNELS)}")
    overrides = {}
    for part in filter(None, (over or "").split(",")):
        key, _, value = (word.strip() for word in part.partition("="))
        known = {name for name, (_, letters) in OVERRIDES.items() if letter in letters}
        if key not in known or not re.fullmatch(r"\d+(\.\d+)?", value):
            raise _stack_fault(stack, at, f"{{{part}}}: write {{key=number}} with a key of {', '.join(sorted(known))}")
        try:
            overrides[OVERRIDES[key][0]] = parse_value(OVERRIDES[key][0].upper(), value)
        except ConfigError as error:
            raise _stack_fault(stack, at, f"{{{part}}}: {str(error).partition(': ')[2]}") from None
    return Block(letter, overrides)


@functools.cache
def parse_stack(stack: str) -> tuple[tuple[Block, ...], tuple[Visits, ...]]:
    """The blocks of a STACK and the order of their visits; raises ConfigError with the column of the fault.

    A9 is nine blocks; [A2]3 makes distinct copies of a group; (A3)*3 visits a group three times with the same weights;
    (A3)*3@0.35 once until 35 % of training and three times from there on; (A3)*1..4~2 a number of times that training
    draws for each row.
    """
    blocks: list[Block] = []
    root: list[Any] = []
    open_groups: list[tuple[str, list[Any], int]] = []
    at, items = 0, root
    while stack[at:].strip():
        match = _STACK_TOKEN.match(stack, at)
        if not match:
            raise _stack_fault(stack, at, "expected a block letter, [ ... ]copies or ( ... )*passes")
        if match["letter"]:
            if match["count"] and not re.fullmatch(r"[1-9]\d{0,2}", match["count"]):
                raise _stack_fault(stack, at, f"{match['count']} copies: must be 1 to 999")
            items += [_parse_block(stack, match["letter"], match["over"], at)] * int(match["count"] or 1)
        elif match["open"]:
            open_groups.append((match["open"], items, at))
            items = []
        else:
            if not open_groups or (open_groups[-1][0] == "[") != (match["close"] == "]"):
                raise _stack_fault(stack, at, f"{match['close']} closes nothing")
            kind, outer, start = open_groups.pop()
            if not items:
                raise _stack_fault(stack, start, "an empty group")
            if kind == "[":
                if not re.fullmatch(r"[1-9]\d{0,3}", match["tail"]):
                    raise _stack_fault(stack, at, "a [ ] group needs its number of copies after it")
                outer += items * int(match["tail"])
            else:
                if any(isinstance(item, tuple) and not isinstance(item, Block) for item in items):
                    raise _stack_fault(stack, start, "a ( ) group inside another is not known")
                outer.append((tuple(items), *_parse_group(stack, match["tail"], at)))
            items = outer
        at = match.end()
        if len(items) > MAX_BLOCKS:
            raise _stack_fault(stack, at, f"more than {MAX_BLOCKS} blocks")
    if open_groups:
        raise _stack_fault(stack, open_groups[-1][2], "a group that is never closed")
    visits = []
    for item in root:
        members, passes, depth = ((item,), ((0.0, 1),), None) if isinstance(item, Block) else item
        visits.append(Visits(tuple(range(len(blocks), len(blocks) + len(members))), passes,
                             not isinstance(item, Block), depth))
        blocks += members
    if len({frac for item in visits for frac, _ in item.passes}) > MAX_PHASES:
        raise ConfigError(f"STACK={stack}: at most {MAX_PHASES} different plans; each is compiled")
    if not blocks or len(blocks) > MAX_BLOCKS or sum(len(v.blocks) * v.most for v in visits) > MAX_VISITS:
        raise ConfigError(f"STACK={stack}: must have 1 to {MAX_BLOCKS} blocks and at most {MAX_VISITS} visits")
    return tuple(blocks), tuple(visits)


def letters_of(stack: str) -> set[str]:
    """The mixers of a STACK."""
    return {block.letter for block in parse_stack(stack)[0]}


def repeats(stack: str) -> bool:
    """Whether a STACK has a ( ) group with several passes."""
    return any(item.most > 1 for item in parse_stack(stack)[1])


EXPERT_STEP = 8  # what the widths of experts are multiples of, for grouped products


def split_width(settings: ModelSettings, hidden: int, experts: int) -> int:
    """The width of an expert: all of a block's, and the parts that every token takes, are as wide together as its whole
    feed-forward would be, or a little less."""
    return hidden // (experts + settings.moe_shared) // EXPERT_STEP * EXPERT_STEP


def feed_forwards(settings: ModelSettings) -> list[tuple[int, int]]:
    """(width, experts) of the feed-forward of each block."""
    own = [own_settings(settings, block) for block in parse_stack(settings.stack)[0]]
    return [(round(one.mlp_mult * one.model_dim), one.moe_experts) for one in own]


def has_experts(settings: ModelSettings) -> bool:
    """Whether a feed-forward is split into experts."""
    return any(experts and hidden for hidden, experts in feed_forwards(settings))


def random_depth(stack: str) -> bool:
    """Whether training draws how often a ( ) group is visited."""
    return any(item.depth for item in parse_stack(stack)[1])


def mean_passes(least: int, most: int, mean: float) -> float:
    """The mean of the passes that training draws: Poisson's, within the bounds."""
    chances = [math.exp(count * math.log(mean) - mean - math.lgamma(count + 1)) for count in range(most)]
    return most + sum(chance * (max(least, count) - most) for count, chance in enumerate(chances))


def evaluation_passes(config: "Config") -> int:
    """The most passes of a ( ) group in evaluation."""
    valve = int(max(config.eval.valve_passes)) if "valve" in config.eval.eval else 0
    return max(max(min(item.depth[1], max(config.eval.eval_passes or round(item.depth[2]), valve)) if item.depth else
                   item.most for item in parse_stack(config.model.stack)[1]), 1)


def cadences(settings: TrainSettings) -> set[int]:
    """The cadences of training; {1} is all passes in every step."""
    return {settings.crawler_cadence_early, settings.crawler_cadence_main, settings.crawler_cadence_late}


def own_settings(settings: ModelSettings, block: Block) -> ModelSettings:
    """The model's settings with a block's own in their places."""
    return dataclasses.replace(settings, **block.overrides)


def check_heads(settings: ModelSettings) -> None:
    """ConfigError unless every block's heads fit the width: attention's in even parts that hold the rotary channels,
    those of recurrent mixers with whole numbers of channels."""
    for block in parse_stack(settings.stack)[0]:
        own = own_settings(settings, block)
        heads, kv = own.num_heads, own.num_kv_heads
        channels, rest = divmod(settings.model_dim, heads)
        if block.letter != "A":
            wide = [settings.model_dim * share / heads for share in (own.expand_k, own.expand_v)]
            if rest or any(size < 1 or abs(size - round(size)) > 1e-6 for size in wide):
                raise ConfigError(f"STACK={settings.stack}: {block.letter} with heads={heads}: must divide "
                                  f"MODEL_DIM={settings.model_dim}, and its parts times EXPAND_K and EXPAND_V must be "
                                  "whole numbers of channels")
            if not (block.letter == "T" and settings.titans_context):
                continue
            kv = heads
        if rest or channels % 2 or heads % kv or settings.rope_dims > 0 and settings.rope_dims % 2 or (
                settings.rope_dims > channels):
            raise ConfigError(f"STACK={settings.stack}: heads={heads} kv={kv}: heads must divide "
                              f"MODEL_DIM={settings.model_dim} into even parts of at least "
                              f"ROPE_DIMS={settings.rope_dims} channels, and kv must divide heads")


# ==== 03 PRESETS ============================================================================================
# A system is a row: its differences from the defaults, and what to change in it under an overlay. A
# circumstance (a CPU, one GPU) is an overlay. Nothing outside this section knows a preset's name. To add a
# system: add a row; the tests enumerate the table.


class Preset(NamedTuple):
    """One system: what it is, where it comes from, its settings, its own settings under an overlay, and the published
    number of parameters with what of it is not here, and why."""
    doc: str
    source: str
    values: dict[str, Any]
    under: dict[str, dict[str, Any]]
    published: int = 0
    mended: tuple[tuple[int, str], ...] = ()


PRESETS: dict[str, Preset] = {
    "baseline": Preset(
        "the challenge's naive baseline; mended: documents are isolated (DOC_ISOLATION=0 is the published habit), "
        "int8 steps have no floor",
        "openai/parameter-golf, root script: 1.2244 BPB",
        {"NORM_EPS": 1.1920929e-07, "SHUFFLE": False, "CODEC": "zlib", "EVAL": "contiguous"},
        {"tiny": {"STACK": "A4", "TIED_EMBED_INIT_STD": 0.02, "MUON_MOMENTUM_WARMUP_STEPS": 50,
                  "WARMDOWN_ITERS": 100}}, 17_059_912),
    "caseops": Preset(
        "the record stack: CaseOps tokens, looped middle, exclusive attention with sparse gates, smeared embeddings, "
        "residual lanes, growing context, GPTQ with LQER and AWQ-lite, phased test-time training; mended: fp32 "
        "masters, clipping after the reduction, gains not decayed, skips by pair of blocks, Hessians over all ranks "
        "and within documents",
        "PR 1855 and 2014 of the challenge: 1.0611 and 1.0576 BPB",
        {"DATA_PATH": "./data/datasets/fineweb10B_sp8192_lossless_caps_caseops_v1_reserved", "VOCAB_SIZE": 8192,
         "STACK": "A3 (A3)*3@0.35 A5", "MLP_MULT": 4.0, "MLP_SLOPE": 0.5, "ROPE_DIMS": 16, "QK_GAIN_INIT": 5.25,
         "NORM_EPS": 1.1920929e-07, "SKIP_GATES_ENABLED": True, "MATRIX_INIT": "orthogonal", "XSA_LAST_N": 11,
         "ATTN_GATE": "sparse", "SPARSE_ATTN_GATE_SCALE": 0.5, "SMEAR_GATE_ENABLED": True, "LN_SCALE": True,
         "PARALLEL_START_LAYER": 8,
         "MATRIX_LR": 0.026, "TIED_EMBED_LR": 0.03, "SCALAR_LR": 0.02, "MUON_MOMENTUM": 0.97,
         "MUON_MOMENTUM_WARMUP_START": 0.92, "MUON_MOMENTUM_WARMUP_STEPS": 1500, "MUON_BACKEND": "polar_express",
         "MUON_ROW_NORMALIZE": True, "MUON_WD": 0.095, "EMBED_WD": 0.085, "BETA2": 0.99, "GRAD_CLIP_NORM": 0.3,
         "WARMDOWN_ITERS": 0, "WARMDOWN_FRAC": 0.85, "MIN_LR": 0.1, "EMA_DECAY": 0.9965,
         "TRAIN_BATCH_TOKENS": 786432, "MICRO_BATCH_TOKENS": 98304, "TRAIN_SEQ_LEN": 3072,
         "TRAIN_SEQ_SCHEDULE": "1024@0.1,2048@0.7,3072@1", "SEQ_CHANGE_WARMUP_STEPS": 32, "VAL_LOSS_EVERY": 4000,
         "MATRIX_BITS": 6, "EMBED_BITS": 7, "ATTN_CLIP_SIGMAS": 13.0, "MLP_CLIP_SIGMAS": 11.5,
         "EMBED_CLIP_SIGMAS": 14.0, "POLICY": "*.attn_gate: int8 k=0", "SOLVER": "gptq", "LQER_RANK": 4,
         "AWQ_LITE_GROUP_TOP_K": 1, "CODEC": "context,brotli",
         "EVAL": "contiguous,ttt", "EVAL_SEQ_LEN": 3072, "EVAL_STRIDE": 1536, "EVAL_BATCH_TOKENS": 131072,
         "TTT_SITES": "k,attn,mlp,head", "TTT_LORA_LR": 7.5e-5, "TTT_SHORT_SCORE_FIRST_STEPS": "256:8,2000:24",
         "TTT_EVAL_SEQ_LEN": 3072, "TTT_BATCH_SIZE": 24, "TTT_WARM_START_A": True, "PHASED_TTT_PREFIX_DOCS": 2500},
        {"tiny": {"DATA_PATH": "./data/datasets/wikitext2_caseops2048", "STACK": "A (A)*2@0.35 A2", "XSA_LAST_N": 4,
                  "PARALLEL_START_LAYER": 3, "MUON_MOMENTUM_WARMUP_STEPS": 100, "MUON_MOMENTUM_WARMUP_START": 0.85,
                  "MUON_MOMENTUM": 0.95, "MUON_WD": 0.0, "EMBED_WD": 0.0, "EMA_DECAY": 0.0, "GRAD_CLIP_NORM": 1.0,
                  "MIN_LR": 0.02, "BETA2": 0.95, "TRAIN_SEQ_SCHEDULE": "128@0.1,256@1", "SEQ_CHANGE_WARMUP_STEPS": 8,
                  "TTT_SHORT_SCORE_FIRST_STEPS": "", "TTT_DOWN_LR": 0.0, "PHASED_TTT_PREFIX_DOCS": 20}},
        35_945_671, ((1024, "one skip less: two positions of the loop bring block 4 to block 5, and share its weights"),
                     (48, "lane scalars of the 8 blocks without lanes, which nothing trained"))),
    "clowncar": Preset(
        "the crawler: one shared block in four passes between flat pairs, told apart by flow instructions; mended: the "
        "instructions are trained, documents are isolated, true GPTQ on Hessians over all passes and of the weights "
        "that are exported, LN_SCALE by the place in the stack; the delta memory, which must begin anew in every pass, "
        "is D{mlp=0,heads=4,gate=0} in the group",
        "PR 990 of the challenge: 1.1813 BPB at 9.1 MB",
        {"STACK": "A2 (A{mlp=4,xsa=1})*4 A2", "MLP_MULT": 3.0, "ROPE_DIMS": 16,
         "ROPE_BASE": 22082.0, "NORM_EPS": 1.1920929e-07, "MATRIX_INIT": "orthogonal", "LN_SCALE": True,
         "BIGRAM_VOCAB_SIZE": 2048, "BIGRAM_DIM": 128, "SMEAR_CHANNELS": True, "LOOP_SKIPS": False,
         "LOOP_INSTRUCTIONS": "flow",
         "MATRIX_LR": 0.03, "TIED_EMBED_LR": 0.035, "SCALAR_LR": 0.025, "MUON_MOMENTUM": 0.99,
         "MUON_MOMENTUM_WARMUP_START": 0.92, "MUON_MOMENTUM_WARMUP_STEPS": 1500, "MUON_WD": 0.04, "EMBED_WD": 0.04,
         "GRAD_CLIP_NORM": 0.3, "WARMDOWN_ITERS": 2000, "EMA_DECAY": 0.997,
         "TRAIN_BATCH_TOKENS": 786432, "MICRO_BATCH_TOKENS": 98304, "TRAIN_SEQ_LEN": 2048, "VAL_LOSS_EVERY": 4000,
         "MATRIX_BITS": 6, "POLICY": "blocks.2.*.weight: int8", "SOLVER": "gptq", "LOOP_AWARE_GPTQ": True,
         "CODEC": "context,brotli", "EVAL_SEQ_LEN": 2048,
         "EVAL_BATCH_TOKENS": 262144},
        {"tiny": {"STACK": "A (A{mlp=4,xsa=1})*4 A", "POLICY": "blocks.1.*.weight: int8",
                  "ROPE_BASE": 10000.0, "TIED_EMBED_INIT_STD": 0.02, "BIGRAM_DIM": 64,
                  "MUON_MOMENTUM_WARMUP_STEPS": 100, "MUON_MOMENTUM_WARMUP_START": 0.85, "MUON_MOMENTUM": 0.95,
                  "MUON_WD": 0.0, "EMBED_WD": 0.0, "EMA_DECAY": 0.0, "GRAD_CLIP_NORM": 1.0, "WARMDOWN_ITERS": 0,
                  "WARMDOWN_FRAC": 0.85}},
        13_430_316, ((163_843, "value embedding that no block read"),)),
    "jamone": Preset(
        "one ternary block, 31 passes, with CAGS; mended: attention is causal, ternary weights get their gradient, "
        "CAGS is placed behind the optimizer's normalisation and has a rate term, bytes are those of a file",
        "JamOne Nano v6.4: no score of a language model was published",
        {"STACK": "(A)*31", "NUM_KV_HEADS": 8, "MLP_MULT": 4.0, "MLP_ACT": "gelu", "POSITIONS": "learned",
         "ROPE_DIMS": -1, "POST_NORM": True, "UNET_SKIPS": False, "LOGIT_SOFTCAP": 0.0, "TIED_EMBED_INIT_STD": 0.02,
         "MATRIX_INIT": "gaussian", "QK_GAIN_INIT": 1.0, "PASS_DROP": 0.05, "MATRIX_FORMAT": "ternary",
         "GROUP_SIZE": 128, "EMBED_BITS": 6, "EMBED_CLIP_SIGMAS": 12.85, "QAT_START": 0.0, "CAGS": "placed",
         "RATE_TERM": 1.0, "MATRIX_LR": 0.02, "TIED_EMBED_LR": 0.01, "SCALAR_LR": 0.01, "GRAD_CLIP_NORM": 1.0,
         "WARMDOWN_ITERS": 0, "WARMDOWN_FRAC": 0.5, "CODEC": "context,range,brotli"},
        {"tiny": {"STACK": "(A)*8", "MATRIX_LR": 0.05, "MUON_MOMENTUM_WARMUP_STEPS": 100, "POSITION_ROWS": 256,
                  "NUM_KV_HEADS": 3}},
        4_200_450, ((4_608, "biases of matrices"), (1_538, "gains of three norms, and of two ternary matrices"),
                    (-2_568, "our gains: mix with the embedding, branches, queries, norm behind the block"))),
    "radial": Preset(
        "radial encoding of places and FRO on a ternary model; mended: the weights are ternary, not binary, and are "
        "stored as trits, bytes are counted as they are, places are told apart beyond 256 and by features without "
        "jumps, FRO-2, whose resonance says something",
        "Radial-BitNet, step 1: 2.6034 published, about 3.5 BPB with the bytes counted right",
        {"STACK": "A12", "MODEL_DIM": 384, "NUM_HEADS": 6, "NUM_KV_HEADS": 2, "MLP_MULT": 3.0, "MLP_ACT": "gelu",
         "POSITIONS": "radial_smooth", "ROPE_DIMS": 16, "UNET_SKIPS": False, "LOGIT_SOFTCAP": 0.0,
         "TIED_EMBED_INIT_STD": 0.02, "QK_GAIN_INIT": 1.0, "MATRIX_OPTIMIZER": "fro2", "FRO_ALPHA": 0.3,
         "FRO_GAMMA": 1.0, "MATRIX_LR": 0.02, "TIED_EMBED_LR": 0.01, "SCALAR_LR": 0.01, "GRAD_CLIP_NORM": 1.0,
         "TRAIN_BATCH_TOKENS": 65536, "MICRO_BATCH_TOKENS": 8192, "WARMDOWN_ITERS": 0, "WARMDOWN_FRAC": 0.5,
         "MATRIX_FORMAT": "ternary", "GROUP_SIZE": 128, "QAT_START": 0.0, "CODEC": "context,range,brotli"},
        {"tiny": {"STACK": "A4", "NUM_HEADS": 3, "NUM_KV_HEADS": 1, "POSITION_ROWS": 256,
                  "MUON_MOMENTUM_WARMUP_STEPS": 100}},
        15_739_776, ((9_600, "gains of 25 norms"), (-384, "a fifth feature of a place"),
                     (-18_504, "our gains: mix with the embedding, branches, queries"))),
    "ternary": Preset(
        "the ternary U-Net: groups of 128 weights, fp8 embedding through a factor, norms before every matrix, "
        "polynomial soft-cap; mended: export is what was trained without a correction, the score has no z-loss in it, "
        "an arithmetic coder instead of packed trits",
        "the challenge's ternary records: 1.1570 and 1.1539 BPB",
        {"DATA_PATH": "./data/datasets/fineweb10B_sp8192", "VOCAB_SIZE": 8192, "STACK": "A10", "MODEL_DIM": 768,
         "MLP_MULT": 4.0, "EXTRA_NORMS": True, "EMBED_DIM": 254, "ROPE_BASE": 5000.0, "YARN_FACTOR": 2.0,
         "LOGIT_SOFTCAP": 10.0, "SOFTCAP_TYPE": "poly", "LOGIT_BIAS": True, "QK_GAIN_INIT": 2.25,
         "MATRIX_INIT": "gaussian", "TIED_EMBED_LR": 0.02, "SCALAR_LR": 0.02, "MUON_BACKEND_STEPS": 3,
         "MUON_ROW_NORMALIZE": True, "Z_LOSS": 1e-4, "WARMDOWN_ITERS": 0, "WARMDOWN_FRAC": 0.2,
         "MATRIX_FORMAT": "ternary", "GROUP_SIZE": 128, "EMBED_FORMAT": "fp8",
         "POLICY": "embed_proj.weight: fp8; head_proj.weight: fp8", "QAT_START": 0.0, "CODEC": "context,range,brotli",
         "EVAL_STRIDE": 16},
        {"tiny": {"DATA_PATH": "./data/datasets/wikitext2_sp2048", "STACK": "A4", "EMBED_DIM": 96, "EVAL_STRIDE": 128,
                  "TIED_EMBED_INIT_STD": 0.02, "MUON_MOMENTUM_WARMUP_STEPS": 100, "WARMDOWN_FRAC": 0.5}}),
    "chimera": Preset(
        "the hybrid stack at 16 MB: gated delta rules, an mLSTM and attention, the middle looped with a state that "
        "fades, passes drawn for each row, ternary weights, norms before every matrix; mended: mixers are what they "
        "are called and strictly causal, the state's decay is below 1 by construction; experts, in-place learning, "
        "retrieval and what is open are settings, off, and so is its span knot, K",
        "Chimera 5.1: a plan and placeholder code, no score was published; shape after its honest reduction",
        {"DATA_PATH": "./data/datasets/fineweb10B_sp8192", "VOCAB_SIZE": 8192, "STACK": "G A (G2 X A)*1..4~2 G A",
         "MODEL_DIM": 768, "MLP_MULT": 4.0, "EXPAND_K": 2 / 3, "EXPAND_V": 4 / 3, "EXTRA_NORMS": True,
         "EMBED_DIM": 312, "LOOP_STATE": "exact", "LOOP_SKIPS": False, "MATRIX_INIT": "gaussian",
         "TIED_EMBED_LR": 0.02, "SCALAR_LR": 0.02, "MUON_BACKEND_STEPS": 3, "MUON_ROW_NORMALIZE": True,
         "WARMDOWN_ITERS": 0, "WARMDOWN_FRAC": 0.5, "MATRIX_FORMAT": "ternary", "GROUP_SIZE": 128,
         "TERNARY_SCALE": "nonzero", "EMBED_FORMAT": "fp8",
         "POLICY": "embed_proj.weight: fp8; head_proj.weight: fp8", "QAT_START": 0.0, "CODEC": "context,range,brotli"},
        {"tiny": {"DATA_PATH": "./data/datasets/wikitext2_sp2048", "STACK": "G (X A)*1..4~2 A", "EMBED_DIM": 96,
                  "EXPAND_K": 1.0, "EXPAND_V": 1.0, "TIED_EMBED_INIT_STD": 0.02, "MUON_MOMENTUM_WARMUP_STEPS": 100,
                  "MIXER_CHUNK": 32}}),
    "sixteen": Preset(
        "our own best stack: the record stack with steps allocated by cost and fitted to the cap, and with strict "
        "test-time training; in a CPU's minutes hashed pairs of tokens in place of what pays later",
        "after PR 1855 and 2014 of the challenge; what was kept and what left: records/LOG.md",
        {"DATA_PATH": "./data/datasets/fineweb10B_sp8192_lossless_caps_caseops_v1_reserved", "VOCAB_SIZE": 8192,
         "STACK": "A3 (A3)*3@0.35 A5", "MLP_MULT": 4.0, "MLP_SLOPE": 0.5, "ROPE_DIMS": 16, "QK_GAIN_INIT": 5.25,
         "SKIP_GATES_ENABLED": True, "MATRIX_INIT": "orthogonal", "XSA_LAST_N": 11, "ATTN_GATE": "sparse",
         "SPARSE_ATTN_GATE_SCALE": 0.5, "SMEAR_GATE_ENABLED": True, "LN_SCALE": True, "PARALLEL_START_LAYER": 8,
         "MATRIX_LR": 0.026, "TIED_EMBED_LR": 0.03, "SCALAR_LR": 0.02, "MUON_MOMENTUM": 0.97,
         "MUON_MOMENTUM_WARMUP_START": 0.92, "MUON_MOMENTUM_WARMUP_STEPS": 1500, "MUON_BACKEND": "polar_express",
         "MUON_ROW_NORMALIZE": True, "MUON_WD": 0.095, "EMBED_WD": 0.085, "BETA2": 0.99, "GRAD_CLIP_NORM": 0.3,
         "WARMDOWN_ITERS": 0, "WARMDOWN_FRAC": 0.85, "MIN_LR": 0.1, "EMA_DECAY": 0.9965,
         "TRAIN_BATCH_TOKENS": 786432, "MICRO_BATCH_TOKENS": 98304, "TRAIN_SEQ_LEN": 3072,
         "TRAIN_SEQ_SCHEDULE": "1024@0.1,2048@0.7,3072@1", "SEQ_CHANGE_WARMUP_STEPS": 32, "VAL_LOSS_EVERY": 4000,
         "MATRIX_CLIP_SIGMAS": 50.0, "EMBED_CLIP_SIGMAS": 30.0, "SOLVER": "gptq", "RATE_ROUNDING": 1.0,
         "ALLOCATE": True, "FIT": True, "CODEC": "context,brotli",
         "EVAL": "contiguous,sliding,ttt", "EVAL_SEQ_LEN": 3072, "EVAL_STRIDE": 1536, "EVAL_BATCH_TOKENS": 131072,
         "TTT_SITES": "k,attn,mlp,head", "TTT_LORA_LR": 7.5e-5, "TTT_SHORT_SCORE_FIRST_STEPS": "256:8,2000:24",
         "TTT_EVAL_SEQ_LEN": 3072, "TTT_BATCH_SIZE": 24},
        {"tiny": {"STACK": "A4", "XSA_LAST_N": 0, "ATTN_GATE": "none", "LN_SCALE": False, "PARALLEL_START_LAYER": 0,
                  "BIGRAM_VOCAB_SIZE": 2048, "BIGRAM_DIM": 64, "QK_GAIN_INIT": 2.5,
                  "TRAIN_SEQ_SCHEDULE": "128@0.3,256@1", "SEQ_CHANGE_WARMUP_STEPS": 8,
                  "MUON_MOMENTUM_WARMUP_STEPS": 100, "MUON_MOMENTUM_WARMUP_START": 0.85,
                  "MUON_MOMENTUM": 0.95, "MUON_WD": 0.0, "EMBED_WD": 0.0, "EMA_DECAY": 0.0, "GRAD_CLIP_NORM": 1.0,
                  "MATRIX_CLIP_SIGMAS": 0.0, "EMBED_CLIP_SIGMAS": 0.0,
                  "MIN_LR": 0.02, "BETA2": 0.95, "TTT_SITES": "q,k,v,attn,mlp,head",
                  "TTT_SHORT_SCORE_FIRST_STEPS": ""}}),
}

OVERLAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "tiny": ("a CPU in minutes, on the embedded WikiText-2", {
        "DATA_PATH": "./data/datasets/wikitext2_sp2048", "VOCAB_SIZE": 2048,
        "MODEL_DIM": 192, "NUM_HEADS": 3, "NUM_KV_HEADS": 1,
        "TRAIN_BATCH_TOKENS": 4096, "MICRO_BATCH_TOKENS": 2048, "TRAIN_SEQ_LEN": 256,
        "MAX_WALLCLOCK_SECONDS": 180.0,
        "TRAIN_LOG_EVERY": 50, "VAL_LOSS_EVERY": 300, "CHECKPOINT_SECONDS": 20.0,
        "EVAL_SEQ_LEN": 256, "EVAL_STRIDE": 128, "EVAL_BATCH_TOKENS": 4096,
        "TTT_LORA_RANK": 8, "TTT_LORA_ALPHA": 8.0, "TTT_LORA_LR": 6e-3, "TTT_DOWN_LR": 1e-3, "TTT_CHUNK_SIZE": 128,
        "TTT_EVAL_SEQ_LEN": 256, "TTT_BATCH_SIZE": 8, "NGRAM_CHUNK_TOKENS": 256}),
    "one_gpu": ("the work of eight GPUs on one: eight times the seconds", {
        "MAX_WALLCLOCK_SECONDS": 4800.0, "EVAL_BUDGET_SECONDS": 4800.0}),
}

# The packer replaces this line by the resolved recipe, so that a packed file repeats its run without an environment.
BAKED: dict[str, object] = {}


def _layer(values: Mapping[str, Any], origin: str, faults: list[str]) -> dict[str, tuple[Any, str]]:
    """Typed values of one source, with its name; faults are collected, not raised."""
    typed = {}
    for name, value in values.items():
        try:
            typed[name] = (parse_value(name, value), origin)
        except ConfigError as fault:
            faults.append(str(fault))
    return typed


def _saved_settings(folder: Path, whose: str) -> dict[str, Any]:
    """The settings in the config.json of a run folder, without those that concern one launch only."""
    path = folder / "config.json"
    try:
        saved = json.loads(path.read_text())["settings"]
        return {name: value for name, value in saved.items()
                if name in SETTINGS and SETTINGS[name][1].metadata["scope"] != "run"}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{whose}: must be a run folder with a readable config.json ({error})") from None


def _user_settings(words: Iterable[str], env: Mapping[str, str], faults: list[str]) -> dict[str, tuple[str, str]]:
    """NAME -> (text, origin) from words and environment. Unknown words, and near misses from the environment, fail."""
    given: dict[str, tuple[str, str]] = {}
    for name, text in env.items():
        if name in SETTINGS:
            given[name] = (text, "environment")
        elif name in RENAMED:
            faults.append(f"{name}={text}: not a setting here: {RENAMED[name]}")
        elif name in ORDINARY_NAMES:
            continue
        elif near := difflib.get_close_matches(name, SETTINGS, 1, 0.85):
            faults.append(f"{name}={text}: not a setting; did you mean {near[0]}?")
    for word in words:
        name, equals, text = word.partition("=")
        if not equals:
            faults.append(f"{word}: not a NAME=value word; --help lists the settings")
        elif name in SETTINGS:
            given[name] = (text, "argument")
        elif name in RENAMED:
            faults.append(f"{name}={text}: not a setting here: {RENAMED[name]}")
        else:
            near = difflib.get_close_matches(name, SETTINGS, 1, 0.5)
            faults.append(f"{name}={text}: not a setting" + (f"; did you mean {near[0]}?" if near else ""))
    return given


def _system_layers(user: dict[str, tuple[Any, str]], gpus: int, faults: list[str]) -> dict[str, tuple[Any, str]]:
    """The settings that come from preset, overlay, packed recipe and FROM, later ones winning."""
    base = {name: field.default for name, (_, field) in SETTINGS.items()}
    names = ("PRESET", "OVERLAY", "FROM", "STAGES", "RUN_ID", "RUNS_PATH")
    pick = {name: user.get(name, (base[name], ""))[0] for name in names}
    saved, whose = {}, f"FROM={pick['FROM']}"
    if pick["FROM"]:
        saved = _saved_settings(Path(pick["FROM"]), whose)
    elif pick["RUN_ID"] and "train" not in pick["STAGES"]:
        # An old run without training is that run: its settings are taken from its own folder.
        whose = f"RUN_ID={pick['RUN_ID']}"
        saved = _saved_settings(Path(pick["RUNS_PATH"]) / pick["RUN_ID"], whose)
    fixed = {**BAKED, **saved}
    for name in ("PRESET", "OVERLAY"):
        if name in fixed:
            if name in user and pick[name] not in (fixed[name], "auto"):
                faults.append(f"{name}={pick[name]}: {whose if name in saved else 'the packed file'} was made with "
                              f"{name}={fixed[name]}")
            pick[name] = fixed[name]
    if pick["PRESET"] not in PRESETS:
        faults.append(f"PRESET={pick['PRESET']}: must be one of {', '.join(PRESETS)}")
        return {}
    if pick["OVERLAY"] == "auto":
        pick["OVERLAY"] = "" if gpus else "tiny"
    if pick["OVERLAY"] not in ("", *OVERLAYS):
        faults.append(f"OVERLAY={pick['OVERLAY']}: must be auto, empty, or one of {', '.join(OVERLAYS)}")
        return {}
    preset, overlay = PRESETS[pick["PRESET"]], pick["OVERLAY"]
    layers = _layer(preset.values, f"preset {pick['PRESET']}", faults)
    if overlay:
        layers |= _layer(OVERLAYS[overlay][1], f"overlay {overlay}", faults)
        layers |= _layer(preset.under.get(overlay, {}), f"preset {pick['PRESET']} under {overlay}", faults)
    layers |= _layer(BAKED, "packed file", faults) | _layer(saved, whose, faults)
    chosen = {name: (pick[name], user[name][1] if name in user else "chosen") for name in ("PRESET", "OVERLAY")}
    return layers | chosen


def load_config(words: Iterable[str], env: Mapping[str, str], gpus: int | None = None) -> Config:
    """The resolved configuration. Later wins: default, preset, overlay, packed file, FROM, environment, words.

    Raises one ConfigError that lists every fault. `gpus` is for tests; by default the machine is asked.
    """
    faults: list[str] = []
    texts = _user_settings(words, env, faults)
    user: dict[str, tuple[Any, str]] = {}
    for name, (text, origin) in texts.items():
        user |= _layer({name: text}, origin, faults)
    layers = _system_layers(user, torch.cuda.device_count() if gpus is None else gpus, faults)
    layers |= {name: value for name, value in user.items() if name not in ("PRESET", "OVERLAY")}
    if faults:
        raise ConfigError("\n".join(faults))
    groups = {owner: cls(**{field.name: layers[setting_name(field)][0] for field in dataclasses.fields(cls)
                            if setting_name(field) in layers}) for owner, cls in GROUPS.items()}
    config = Config(**groups, origins={name: origin for name, (value, origin) in layers.items()
                                       if value != SETTINGS[name][1].default})
    faults += [text.format(**config._asdict()) for holds, text in RULES if not holds(config)]
    parse_policy(config.artifact.policy)
    parse_stack(config.model.stack)
    if not faults:
        check_heads(config.model)
    if faults:
        raise ConfigError("\n".join(faults))
    return config


def with_settings(config: Config, values: Mapping[str, Any]) -> Config:
    """The configuration with some settings changed."""
    for name, value in values.items():
        owner, field = SETTINGS[name]
        config = config._replace(**{owner: dataclasses.replace(getattr(config, owner),
                                                               **{field.name: parse_value(name, value)})})
    if faults := [text.format(**config._asdict()) for holds, text in RULES if not holds(config)]:
        raise ConfigError("\n".join(faults))
    return config


def baked(config: Config) -> dict[str, Any]:
    """What the packed file carries: of the recipe all that no default says, or that a preset may say otherwise."""
    preset, overlay = PRESETS[config.run.preset], config.run.overlay
    rows = {"PRESET", "OVERLAY", *preset.values, *preset.under.get(overlay, ()),
            *(OVERLAYS[overlay][1] if overlay else ())}
    plain = {name: list(field.default) if isinstance(field.default, tuple) else field.default
             for name, (_, field) in SETTINGS.items()}
    return {name: value for name, value in config.recipe().items() if name in rows or value != plain[name]}


def differences_text(config: Config) -> str:
    """The settings that differ from their defaults: name, value, default, who set it."""
    flat = config.flat()
    return "\n".join(f"  {name:<28} {show_value(flat[name]):<36} default {show_value(SETTINGS[name][1].default):<28} "
                     f"{config.origins[name]}" for name in SETTINGS if name in config.origins)


def presets_text() -> str:
    """--presets: every system and overlay, then the matrix setting x preset of what differs from the defaults."""
    lines = [f"  {name:<10} {row.doc} ({row.source})" for name, row in PRESETS.items()]
    lines += [f"  OVERLAY={name:<10} {doc}" for name, (doc, _) in OVERLAYS.items()]
    names = [name for name in SETTINGS if any(name in row.values for row in PRESETS.values())]
    lines += ["", f"  {'setting':<28} {'default':<24}" + "".join(f"{name:<24}" for name in PRESETS)]
    for name in names:
        cells = [show_value(parse_value(name, row.values[name])) if name in row.values else "."
                 for row in PRESETS.values()]
        default = show_value(SETTINGS[name][1].default)
        lines.append(f"  {name:<28} {default[-23:]:<24}" + "".join(f"{cell[-23:]:<24}" for cell in cells).rstrip())
    return "\n".join(lines)


# ==== 04 RUNTIME ============================================================================================
# The outside world, made small: ranks, seconds, random streams, the log, files that are whole or absent.
# Nothing here knows about models. Time comes from the clock that is passed in; only rank 0 writes.


@dataclasses.dataclass(frozen=True)
class World:
    """The processes of a run, and the lanes of this one. At one rank every collective is the identity, so all code runs
    without a process group."""
    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")
    lanes: int = 1

    @property
    def first(self) -> bool:
        """True on the rank that writes files and prints."""
        return self.rank == 0

    def add_(self, tensor: Tensor) -> Tensor:
        """The tensor, summed over ranks in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def begin_add(self, tensor: Tensor) -> Callable[[], object]:
        """Begin to sum the tensor over ranks in place; it holds the sum once the returned function has been called."""
        return dist.all_reduce(tensor, async_op=True).wait if self.size > 1 else lambda: None

    def begin_collect(self, tensor: Tensor) -> tuple[Tensor, Callable[[], object]]:
        """Begin to collect the ranks' tensors, of one shape (n, ...), as (ranks * n, ...); whole once the returned
        function has been called."""
        if self.size == 1:
            return tensor, lambda: None
        whole = tensor.new_empty(self.size * tensor.shape[0], *tensor.shape[1:])
        return whole, dist.all_gather_into_tensor(whole, tensor.contiguous(), async_op=True).wait

    def same(self, value: Any) -> Any:
        """Rank 0's value on all ranks."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, in rank order, on all ranks."""
        if self.size == 1:
            return [value]
        boxes: list[Any] = [None] * self.size
        dist.all_gather_object(boxes, value)
        return boxes

    @functools.cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self.lanes)

    def each(self, function: Callable[[Any], Any], items: list[Any]) -> list[Any]:
        """function(item) of every item, in their order, computed on this process's lanes side by side.

        On a CPU a lane is a thread that runs whole forwards alone. Lanes do not wait for each other within a forward,
        which gains most where tensors are small or something else uses the machine (records/LOG.md).
        """
        if self.lanes == 1 or len(items) < 2:
            return [function(item) for item in items]
        return list(self._pool.map(function, items))

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.size > 1:
            dist.barrier()


def make_world(env: Mapping[str, str]) -> World:
    """The world torchrun describes in its variables; one CPU or GPU without them. NCCL on GPUs, Gloo on CPUs."""
    rank, size, local = (int(env.get(name, default)) for name, default in
                         (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        if local >= torch.cuda.device_count():
            raise ConfigError(f"NPROC={env.get('LOCAL_WORLD_SIZE', size)}: this machine has "
                              f"{torch.cuda.device_count()} GPUs, one process each")
        torch.cuda.set_device(device)
    if size > 1:
        # What the host decides goes through Gloo, so that no rank waits for its GPU to hear it.
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", rank=rank, world_size=size,
                                timeout=timedelta(minutes=30))
    return World(rank, size, device)


def share_threads(world: World, threads: int, local_size: int, jobs: int) -> tuple[World, int]:
    """The world with its lanes, and the CPU threads of this process: the setting, or all usable cores over the local
    processes. A CPU gets as many lanes as there are jobs to fill them, and the lanes share the threads."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count = threads or max(1, cores // local_size)
    lanes = max(1, min(count, jobs)) if world.device.type == "cpu" else 1
    torch.set_num_threads(count // lanes)
    return dataclasses.replace(world, lanes=lanes), count


def stream_seed(seed: int, purpose: str, index: int = 0) -> int:
    """A 63-bit seed for one purpose: a new random draw in one place shifts nothing elsewhere."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{index}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def sha256_file(path: str | Path) -> str:
    """Hex sha256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomic(path: Path, data: bytes) -> None:
    """The file is the old one or the new one, never half of it, whenever the process dies."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Indented JSON, atomically."""
    write_atomic(path, (json.dumps(value, indent=1, sort_keys=False) + "\n").encode())


CHAIN = re.compile(r', "chain": "([0-9a-f]{64})"\}$')


def link(chain: str, body: str) -> str:
    """The chain behind an event, from that before it and the event's text without one."""
    return hashlib.sha256((chain + body).encode()).hexdigest()


class Log:
    """train.log for people and events.jsonl for tools, opened once, on rank 0; other ranks have a silent one. Every
    event holds a hash of itself and of what came before, so that a line that is edited, dropped or moved shows."""

    def __init__(self, folder: Path | None, clock: Callable[[], float]) -> None:
        self.clock, self.start = clock, clock()
        self.bar: Any = None
        self.text = self.events = None
        self.chain, self.lock = "", threading.Lock()  # checkpoints are logged by the thread that writes them
        if folder is not None:
            self.text = open(folder / "train.log", "a", encoding="utf-8", buffering=1)
            self.events = open(folder / "events.jsonl", "a", encoding="utf-8", buffering=1)
            if self.events.tell():
                before = (folder / "events.jsonl").read_text(encoding="utf-8", errors="replace")
                # What a kill cut short stays a line of its own, outside the chain.
                self.events.write("" if before.endswith("\n") else "\n")
                chained = (found[1] for line in reversed(before.splitlines()) if (found := CHAIN.search(line)))
                self.chain = next(chained, "")

    def line(self, text: str = "") -> None:
        """One line or several to the terminal and to train.log."""
        if self.text is None:
            return
        if self.bar is not None:
            self.bar.clear()
        print(text, flush=True)
        self.text.write(text + "\n")

    def event(self, name: str, /, **values: Any) -> None:
        """One line of events.jsonl: the event's name, seconds since this process started, and the values."""
        if self.events is not None:
            body = json.dumps({"event": name, "t": round(self.clock() - self.start, 3), **values})
            with self.lock:
                self.chain = link(self.chain, body)
                self.events.write(f'{body[:-1]}, "chain": "{self.chain}"}}\n')

    def close(self) -> None:
        """Close both files."""
        for file in (self.text, self.events):
            if file is not None:
                file.close()


def read_json_object(path: Path, whose: str) -> dict[str, Any]:
    """The JSON object in a file of a run folder; ConfigError, naming `whose` it is, when it is absent or damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict) or not isinstance(value.get("settings", {}), dict):
            raise ValueError("not an object")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{whose}: {path} cannot be read ({error})") from None
    return value


def git_commit(folder: Path) -> str:
    """The commit of the checkout a folder belongs to, with a + for local changes, or `unknown`."""
    try:
        commit = subprocess.run(["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True)
        dirty = subprocess.run(["git", "-C", str(folder), "status", "--porcelain", "-uno"], capture_output=True,
                               text=True)
    except OSError:
        return "unknown"
    return commit.stdout.strip() + ("+" if dirty.stdout.strip() else "") if commit.returncode == 0 else "unknown"


def environment_facts(world: World, threads: int) -> dict[str, Any]:
    """What a reader needs to judge seconds: versions, device, counts."""
    facts = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__,
             "platform": platform.platform(), "processes": world.size, "threads": threads,
             "cpu": torch.backends.cpu.get_cpu_capability(), "device": str(world.device)}
    if world.device.type == "cuda":
        facts |= {"gpu": torch.cuda.get_device_name(world.device), "cuda": torch.version.cuda,
                  "nccl": ".".join(map(str, torch.cuda.nccl.version()))}
    return facts


# ==== 05 DATA ===============================================================================================
# Tokens and their bytes. Shards have the challenge's format, so official ones work unchanged. Nothing is used
# before the manifest has proved it: sizes, hashes, counts, and that no validation document was trained on.
# This section is the only one that knows how many bytes a token stands for. Exact counts of n-grams, for
# evaluation and training, stand at its end.

SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER_BYTES = 20240520, 1, 1024
BOS = 1
MANIFEST_FORMAT = 1


def read_shard(path: str | Path) -> np.ndarray:
    """The tokens of a shard, memory-mapped uint16 (n,). Raises ConfigError for a foreign, damaged or absent file."""
    path = Path(path)
    try:
        size = path.stat().st_size
        header = np.fromfile(path, dtype="<i4", count=SHARD_HEADER_BYTES // 4)
    except OSError as error:
        raise ConfigError(f"DATA_PATH={path}: cannot be read ({error.strerror})") from None
    if header.size < SHARD_HEADER_BYTES // 4:
        raise ConfigError(f"DATA_PATH={path}: a shard has a header of {SHARD_HEADER_BYTES} bytes, this file {size}")
    if header[0] != SHARD_MAGIC or header[1] != SHARD_VERSION:
        raise ConfigError(f"DATA_PATH={path}: magic and version are {header[0]} {header[1]}, must be "
                          f"{SHARD_MAGIC} {SHARD_VERSION}")
    if size != SHARD_HEADER_BYTES + 2 * int(header[2]):
        raise ConfigError(f"DATA_PATH={path}: {size} bytes, but {header[2]} tokens make "
                          f"{SHARD_HEADER_BYTES + 2 * int(header[2])}; truncated or overlong")
    if header[2] == 0:
        raise ConfigError(f"DATA_PATH={path}: a shard must have tokens, this one has none")
    return np.memmap(path, dtype="<u2", mode="r", offset=SHARD_HEADER_BYTES)


class TokenStream:
    """Several shards as one stream of tokens."""

    def __init__(self, shards: list[np.ndarray]) -> None:
        self.shards = shards
        self.starts = np.concatenate([[0], np.cumsum([len(shard) for shard in shards])]).astype(np.int64)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def take(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) as int64 (stop - start,), across shard borders."""
        first = int(np.searchsorted(self.starts, start, side="right")) - 1
        parts = []
        while start < stop:
            end = min(stop, int(self.starts[first + 1]))
            parts.append(self.shards[first][start - self.starts[first]:end - self.starts[first]])
            start, first = end, first + 1
        return np.concatenate(parts).astype(np.int64)


def load_tokenizer(path: Path, vocab_size: int) -> Any:
    """The SentencePiece model at `path`; ConfigError if it is absent, damaged or of another vocabulary size."""
    import sentencepiece
    try:
        tokenizer = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
    except (OSError, RuntimeError) as error:
        raise ConfigError(f"TOKENIZER_PATH={path}: not a readable SentencePiece model ({error})") from None
    if tokenizer.vocab_size() != vocab_size:
        raise ConfigError(f"VOCAB_SIZE={vocab_size}: the tokenizer {path} has {tokenizer.vocab_size()}")
    if tokenizer.piece_to_id("\u2581") == tokenizer.unk_id():
        raise ConfigError(f"TOKENIZER_PATH={path}: no piece for a single space (U+2581), which counts as 3 bytes")
    return tokenizer


def make_byte_counter(tokenizer: Any, rule: str) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """A function (previous token, target token), both (n,) -> UTF-8 bytes of each target, int64 (n,).

    `lossless`: every piece counts what it decodes to. `challenge`: the challenge's table rule, in which a leading space
    counts only after an ordinary token (its tokenizers collapse spaces, so no piece has an inner one; where a foreign
    one does, it is one byte too). Control tokens, BOS among them, count zero.
    """
    if rule not in ("lossless", "challenge"):
        raise ConfigError(f"byte_rule={rule}: must be lossless or challenge")
    size = tokenizer.vocab_size()
    counts, leads = np.zeros(size, np.int64), np.zeros(size, np.int64)
    boundary = np.zeros(size, bool)
    for token in range(size):
        if tokenizer.is_control(token) or tokenizer.is_unknown(token) or tokenizer.is_unused(token):
            boundary[token] = True
        elif tokenizer.is_byte(token):
            counts[token] = 1
        else:
            piece = tokenizer.id_to_piece(token)
            if rule == "challenge" and piece.startswith("\u2581"):
                leads[token], piece = 1, piece[1:]
            counts[token] = len(piece.replace("\u2581", " ").encode())
    return lambda previous, target: counts[target] + leads[target] * ~boundary[previous]


class Validation(NamedTuple):
    """The validation split in memory: tokens (n,) int64, bytes of each token as a target (n,) int64, documents."""
    tokens: np.ndarray
    bytes: np.ndarray
    documents: int
    lossless: bool


class Data(NamedTuple):
    """A dataset that passed its checks."""
    train: TokenStream
    val: Validation
    manifest: dict[str, Any]
    manifest_sha256: str
    tokenizer_sha256: str
    tokenizer: Any


def _check_manifest(manifest: Any) -> None:
    """KeyError, TypeError or ValueError unless every field that is used below is there and has its type."""
    tokenizer, val, train, disjoint = (manifest[key] for key in ("tokenizer", "val", "train", "disjoint"))
    wanted = [(manifest, "source", str), (manifest, "byte_rule", str), (tokenizer, "path", str),
              (tokenizer, "sha256", str), (tokenizer, "vocab_size", int), (tokenizer, "lossless", bool),
              (val, "documents", int), (val, "tokens", int), (val, "counted_bytes", int), (train, "tokens", int),
              (disjoint, "common", int)]
    for entry in (*train["shards"], *val["shards"], *val["sidecars"]):
        wanted += [(entry, "file", str), (entry, "tokens", int), (entry, "sha256", str)]
        if Path(entry["file"]).name != entry["file"]:
            raise ValueError(f"{entry['file']} is not a plain file name")
    for owner, key, kind in wanted:
        if type(owner[key]) is not kind:
            raise ValueError(f"{key} must be of type {kind.__name__}")
    if not train["shards"] or not val["shards"] or (manifest["byte_rule"] == "sidecar") != bool(val["sidecars"]):
        raise ValueError("training and validation need shards, and the byte rule sidecar needs sidecars")
    if tokenizer["lossless"] and manifest["byte_rule"] == "challenge":
        raise ValueError("the byte rule challenge is for lossy tokenizers")
    if tokenizer["lossless"] and manifest["source"] in ("wikitext2", "text") and type(val["bytes"]) is not int:
        raise ValueError("the bytes of the validation documents must be known")


def _read_manifest(folder: Path) -> tuple[dict[str, Any], str]:
    """manifest.json and its sha256; ConfigError when absent, unreadable or of another format."""
    path = folder / "manifest.json"
    if not folder.is_dir():
        raise ConfigError(f"DATA_PATH={folder}: no such folder; data/prepare.py makes one")
    try:
        raw = path.read_bytes()
        manifest = json.loads(raw)
        if manifest["format"] != MANIFEST_FORMAT:
            raise ConfigError(f"DATA_PATH={path}: format {manifest['format']}, must be {MANIFEST_FORMAT}")
        _check_manifest(manifest)
    except OSError as error:
        raise ConfigError(f"DATA_PATH={folder}: manifest.json cannot be read ({error.strerror}); "
                          "`python data/prepare.py manifest` makes one for shards that are there") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"DATA_PATH={path}: not a manifest ({error!r})") from None
    common = manifest["disjoint"]["common"]
    # Only shards that were downloaded from the challenge's own repositories may repeat a document, as published.
    if common != 0 and not manifest["source"].startswith("fineweb ("):
        raise ConfigError(f"DATA_PATH={path}: {common} validation documents are in the training shards; must be 0")
    return manifest, hashlib.sha256(raw).hexdigest()


def _check_shards(folder: Path, manifest: dict[str, Any]) -> None:
    """ConfigError unless every shard has the count and sha256 of the manifest, and no token beyond the vocabulary.

    Reading many gigabytes takes long, so a file that passed is remembered by size and time in `.verified.json`.
    """
    stamp_path = folder / ".verified.json"
    try:
        known = json.loads(stamp_path.read_text())
    except (OSError, ValueError):
        known = {}
    seen, vocab_size = {}, manifest["tokenizer"]["vocab_size"]
    for split, names in (("train", ("shards",)), ("val", ("shards", "sidecars"))):
        for entry in (entry for name in names for entry in manifest[split].get(name, [])):
            path = folder / entry["file"]
            tokens = read_shard(path)
            if len(tokens) != entry["tokens"]:
                raise ConfigError(f"DATA_PATH={path}: {len(tokens)} tokens, the manifest says {entry['tokens']}")
            status = path.stat()
            stamp = [status.st_size, status.st_mtime_ns, entry["sha256"], vocab_size]
            if known.get(entry["file"]) != stamp:
                if sha256_file(path) != entry["sha256"]:
                    raise ConfigError(f"DATA_PATH={path}: sha256 differs from the manifest's {entry['sha256'][:16]}...")
                if entry not in manifest["val"]["sidecars"] and int(tokens.max()) >= vocab_size:
                    raise ConfigError(f"DATA_PATH={path}: token {tokens.max()} is beyond VOCAB_SIZE={vocab_size}")
            seen[entry["file"]] = stamp
        total = sum(entry["tokens"] for entry in manifest[split]["shards"])
        if total != manifest[split]["tokens"]:
            raise ConfigError(f"DATA_PATH={folder}: the {split} shards have {total} tokens, the manifest says "
                              f"{manifest[split]['tokens']}")
    if seen != known:
        with contextlib.suppress(OSError):
            write_json(stamp_path, seen)


def _count_validation_bytes(manifest: dict[str, Any], folder: Path, tokenizer: Any, tokens: np.ndarray) -> np.ndarray:
    """Bytes of each validation token as a target, int64 (n,), from sidecar or tokenizer; their sum is checked."""
    if manifest["byte_rule"] == "sidecar":
        counts = np.concatenate([read_shard(folder / entry["file"]) for entry in manifest["val"]["sidecars"]])
        if len(counts) != len(tokens):
            raise ConfigError(f"DATA_PATH={folder}: the sidecar has {len(counts)} entries for {len(tokens)} tokens")
        counts = counts.astype(np.int64)
    else:
        counter = make_byte_counter(tokenizer, manifest["byte_rule"])
        counts = np.concatenate([[0], counter(tokens[:-1], tokens[1:])])
    expected, documents = manifest["val"]["counted_bytes"], manifest["val"].get("bytes")
    if not counts.any():
        raise ConfigError(f"DATA_PATH={folder}: the validation documents have no bytes, so there is nothing to score")
    if counts.sum() != expected:
        raise ConfigError(f"DATA_PATH={folder}: validation counts {counts.sum()} bytes, the manifest says {expected}")
    if manifest["tokenizer"]["lossless"] and documents is not None and documents != expected:
        raise ConfigError(f"DATA_PATH={folder}: a lossless tokenizer must count the {documents} bytes of the "
                          f"validation documents, the manifest says {expected}")
    return counts


def load_data(settings: DataSettings, world: World) -> Data:
    """The checked dataset. Rank 0 hashes; all ranks map the shards. Raises ConfigError naming file and rule."""
    folder = Path(settings.data_path)
    manifest, manifest_sha256 = _read_manifest(folder)
    fault = ""
    if world.first:
        try:
            _check_shards(folder, manifest)
        except (ConfigError, OSError) as error:
            fault = str(error)
    if fault := world.same(fault):
        raise ConfigError(fault)
    path = Path(settings.tokenizer_path) if settings.tokenizer_path else folder / manifest["tokenizer"]["path"]
    tokenizer = load_tokenizer(path, settings.vocab_size)
    tokenizer_sha256 = sha256_file(path)
    if tokenizer_sha256 != manifest["tokenizer"]["sha256"]:
        raise ConfigError(f"TOKENIZER_PATH={path}: not the tokenizer of the shards (its sha256 is not the manifest's)")
    tokens = np.concatenate([read_shard(folder / entry["file"]) for entry in manifest["val"]["shards"]])
    tokens = tokens.astype(np.int64)
    if tokens[0] != BOS or tokens.max() >= settings.vocab_size or len(tokens) < 2:
        raise ConfigError(f"DATA_PATH={folder}: validation must begin with BOS={BOS}, have two tokens or more and none "
                          f"from VOCAB_SIZE={settings.vocab_size} up; the largest is {tokens.max()}")
    if int((tokens == BOS).sum()) != manifest["val"]["documents"]:
        raise ConfigError(f"DATA_PATH={folder}: validation has {(tokens == BOS).sum()} documents, the manifest says "
                          f"{manifest['val']['documents']}")
    counts = _count_validation_bytes(manifest, folder, tokenizer, tokens)
    train = TokenStream([read_shard(folder / entry["file"]) for entry in manifest["train"]["shards"]])
    val = Validation(tokens, counts, int((tokens == BOS).sum()), bool(manifest["tokenizer"]["lossless"]))
    return Data(train, val, manifest, manifest_sha256, tokenizer_sha256, tokenizer)


def document_index(tokens: Tensor) -> Tensor:
    """The document number of each token within its row, int32 (B, T): one more at every BOS."""
    return (tokens == BOS).cumsum(dim=-1, dtype=torch.int32)


SPAN_BUCKET = 64


class Spans(NamedTuple):
    """Who may see whom in a batch of N tokens, as kernels for variable lengths want it: span s is the flat positions
    [starts[s], starts[s + 1]), int32 (S + 1,), empty ones at the end. `longest` bounds all lengths."""
    starts: Tensor
    longest: int

    def docs(self, shape: torch.Size) -> Tensor:
        """The same as a number for each token, int32 (B, T)."""
        flat = torch.arange(shape.numel(), device=self.starts.device, dtype=torch.int32)
        return torch.bucketize(flat, self.starts, out_int32=True, right=True).view(shape)


def make_spans(breaks: np.ndarray, count: int, longest: int, device: torch.device) -> Spans:
    """Spans of `count` tokens that begin at 0 and at the rising positions `breaks`; `starts` is filled up to a multiple
    of SPAN_BUCKET, so that a compiled graph sees few different lengths."""
    starts = np.full(-(-(len(breaks) + 2) // SPAN_BUCKET) * SPAN_BUCKET, count, np.int32)
    starts[0] = 0
    starts[1:1 + len(breaks)] = breaks
    held = torch.from_numpy(starts)
    if device.type == "cuda":
        held = held.pin_memory().to(device, non_blocking=True)
    return Spans(held, longest)


def row_spans(docs: np.ndarray, device: torch.device) -> Spans:
    """Spans of the documents (B, T) of several rows, for the rows behind each other."""
    new = np.ones(docs.shape, bool)
    new[:, 1:] = docs[:, 1:] != docs[:, :-1]
    return make_spans(np.flatnonzero(new)[1:], docs.size, docs.shape[1], device)


def span_breaks(tokens: np.ndarray, length: int, isolate: bool) -> np.ndarray:
    """Where a packed row (N,) is cut: at every BOS, and within a document after every `length` tokens; without
    `isolate` after every `length` tokens only. Position 0 is not named."""
    begins = np.union1d([0], np.flatnonzero(tokens == BOS)) if isolate else np.zeros(1, np.int64)
    sizes = np.diff([*begins, len(tokens)])
    pieces = -(-sizes // length)
    return (np.repeat(begins, pieces) + length * spans(np.zeros(len(pieces), np.int64), pieces))[1:]


class Lessons(NamedTuple):
    """What n-grams say of a batch's N targets: weights of their loss (N,), each order's probability of them (N, E), and
    whether it had seen their context (N, E)."""
    weights: Tensor
    chances: Tensor
    seen: Tensor


class Batch(NamedTuple):
    """One forward's worth: inputs and next-token targets (B, T) int64, documents (int32 (B, T), spans of one packed
    row, or None), lessons, and which passes of ( ) groups take part (N,), or None."""
    tokens: Tensor
    targets: Tensor
    docs: "Tensor | Spans | None"
    lessons: Lessons | None = None
    keep: Tensor | None = None


class Batches:
    """Training tokens as a pure function of the micro-batch's global index, the same whatever the number of ranks.

    The stream is cut into blocks; each epoch starts at another offset and, with SHUFFLE, visits its blocks in another
    order, so that no token is always first and at most two blocks at the ends of the stream are left out. A micro-batch
    is some blocks, cut into rows of the current context; or, `packed`, one block as one row, whose spans are documents
    and parts of long ones. A change of the context cuts the same tokens otherwise: none is lost or comes twice.
    """

    def __init__(self, stream: TokenStream, data: DataSettings, train: TrainSettings, seed: int,
                 packed: bool = False) -> None:
        lengths = [length for _, length in parse_seq_schedule(train)]
        self.stream, self.data, self.seed, self.longest, self.packed = stream, data, seed, lengths[-1], packed
        self.block = train.micro_batch_tokens if packed else math.lcm(*lengths)
        self.blocks_per_micro = train.micro_batch_tokens // self.block
        self.blocks_per_epoch = (len(stream) - 1) // self.block - 1
        if self.blocks_per_epoch < 1:
            raise ConfigError(f"TRAIN_SEQ_LEN={train.train_seq_len}: the training shards have {len(stream)} tokens, "
                              f"less than two rows of {self.block}" + (", a packed micro-batch" * packed))
        # Kept and replaced as a whole: several threads read it.
        self.epoch: tuple[int, int, np.ndarray] = (-1, 0, np.empty(0, np.int64))

    def _start(self, index: int) -> int:
        """First token of the block with this global index."""
        number, place = divmod(index, self.blocks_per_epoch)
        if not self.data.shuffle:
            return place * self.block
        epoch = self.epoch
        if epoch[0] != number:
            rng = np.random.Generator(np.random.PCG64(stream_seed(self.seed, "rows", number)))
            epoch = self.epoch = number, int(rng.integers(self.block)), rng.permutation(self.blocks_per_epoch)
        return int(epoch[2][place]) * self.block + epoch[1]

    def micro(self, index: int, world: World, length: int = 0) -> Batch:
        """Micro-batch `index` of the whole run, on the world's device, with a context of `length` (0: the longest)."""
        length = length or self.longest
        starts = [self._start(index * self.blocks_per_micro + block) for block in range(self.blocks_per_micro)]
        blocks = np.stack([self.stream.take(start, start + self.block + 1) for start in starts])
        held = torch.from_numpy(np.stack([blocks[:, :-1].ravel(), blocks[:, 1:].ravel()]))
        if world.device.type == "cuda":
            held = held.pin_memory().to(world.device, non_blocking=True)
        tokens, targets = held.view(2, 1, -1) if self.packed else held.view(2, -1, length)
        if self.packed:
            breaks = span_breaks(blocks[0, :-1], length, self.data.doc_isolation)
            return Batch(tokens, targets, make_spans(breaks, tokens.numel(), self.longest, world.device))
        return Batch(tokens, targets, document_index(tokens) if self.data.doc_isolation else None)


UNSEEN = 0xFFFFFFFF  # the number of an n-gram that was never seen; no n-gram has it
LEVEL_RATIO = 4  # the sorted levels of a table grow by this factor at least
ABSORB_TOKENS = 65536  # tokens counted at a time, which bounds the memory of a long call


def spans(start: np.ndarray, size: np.ndarray) -> np.ndarray:
    """The integers start[i] .. start[i] + size[i] - 1 of all spans, one span after the other: (sum of size,)."""
    stop = np.cumsum(size)
    return np.repeat(start - stop + size, size) + np.arange(stop[-1] if len(stop) else 0)


class Matches(NamedTuple):
    """What followed the contexts of one order. `which` (S,): a position's row among the U different contexts. `pairs`
    (M,): row << 16 | token, rising, row u at start[u] .. start[u + 1]; `count` (M,) of each. Of every row (U,): the sum
    of its counts, its number of tokens, its most frequent token (the smallest of equals) and that one's count."""
    which: np.ndarray
    pairs: np.ndarray
    count: np.ndarray
    start: np.ndarray
    total: np.ndarray
    kinds: np.ndarray
    hint: np.ndarray
    best: np.ndarray


def make_matches(which: np.ndarray, rows: int, pairs: np.ndarray, count: np.ndarray) -> Matches:
    """Matches of U = `rows` contexts from their sorted pairs and counts."""
    row = pairs >> 16
    kinds = np.bincount(row, minlength=rows)
    start, seen = np.concatenate([[0], np.cumsum(kinds)]), kinds > 0
    total, top = np.bincount(row, count, rows).astype(np.int64), np.zeros(rows, np.int64)
    if len(pairs):
        top[seen] = np.maximum.reduceat(count << 16 | ~pairs & 0xFFFF, start[:-1][seen])
    return Matches(which, pairs, count, start, total, kinds, ~top & 0xFFFF, top >> 16)


class Grams:
    """The different n-grams of one length, each a pair (number of its beginning << 32 | last token or number of its
    end) with its own number and its count: sorted levels, merged so that their sizes fall by LEVEL_RATIO. A pair stands
    in one level only; its count is raised there."""

    def __init__(self) -> None:
        self.levels: list[list[np.ndarray]] = []  # [pairs uint64, numbers uint32, counts uint32]
        self.size = 0

    def find(self, pairs: np.ndarray, times: np.ndarray | None = None) -> np.ndarray:
        """Numbers uint32 (S,), UNSEEN for strangers; the counts of pairs, then all different, rise by `times` (S,)."""
        numbers = np.full(len(pairs), UNSEEN, np.uint32)
        for known, number, count in self.levels:
            at = np.minimum(np.searchsorted(known, pairs), len(known) - 1)
            hit = known[at] == pairs
            numbers[hit] = number[at[hit]]
            if times is not None:
                count[at[hit]] += times[hit]
        return numbers

    def add(self, pairs: np.ndarray) -> np.ndarray:
        """Count every pair (S,) once more; their numbers uint32 (S,)."""
        fresh, place, times = np.unique(pairs, return_inverse=True, return_counts=True)
        times = times.astype(np.uint32)
        numbers = self.find(fresh, times)
        new = np.flatnonzero(numbers == UNSEEN)
        if len(new):
            numbers[new] = np.arange(self.size, self.size + len(new))
            self.size += len(new)
            self.levels.append([fresh[new], numbers[new], times[new]])
        while len(self.levels) > 1 and len(self.levels[-2][0]) < LEVEL_RATIO * len(self.levels[-1][0]):
            late, early = self.levels.pop(), self.levels[-1]
            at = np.searchsorted(early[0], late[0])
            for column in range(3):
                early[column] = np.insert(early[column], at, late[column])
        return numbers[place]

    def follow(self, begins: np.ndarray) -> Matches:
        """What followed the contexts with these numbers (S,)."""
        begins, which = np.unique(begins.astype(np.uint64), return_inverse=True)
        low, parts = begins << np.uint64(32), [(np.zeros(0, np.int64),) * 2]
        for known, _, count in self.levels:
            start = np.searchsorted(known, low)
            size = np.searchsorted(known, low | np.uint64(UNSEEN), side="right") - start
            at = spans(start, size)
            tokens = (known[at] & np.uint64(0xFFFF)).astype(np.int64)
            parts.append((np.repeat(np.arange(len(size)) << 16, size) | tokens, count[at].astype(np.int64)))
        pairs, count = (np.concatenate(column) for column in zip(*parts, strict=True))
        order = np.argsort(pairs, kind="stable")
        return make_matches(which, len(begins), pairs[order], count[order])


class NgramStore:
    """Exact counts of the n-grams of the given orders (each 2 at least) in one stream of tokens below 65536. A context
    is known by its number, which is found by halves or token by token, so that nothing can collide."""

    def __init__(self, orders: tuple[int, ...], vocab_size: int) -> None:
        self.orders, self.unigrams = orders, np.zeros(vocab_size, np.int64)
        self.tail = np.zeros(0, np.int64)
        self.halves: dict[int, tuple[int, int]] = {}  # length of a gram -> lengths of its beginning and its end
        wanted = [*orders]
        while wanted:
            if (size := wanted.pop()) > 1 and size not in self.halves:
                half = 1 << (size - 1).bit_length() - 1
                chained = size in orders or size - 1 in orders
                self.halves[size] = (size - 1, 1) if chained else (half, half)
                wanted += self.halves[size]
        self.grams = {size: Grams() for size in sorted(self.halves)}

    def _number(self, tokens: np.ndarray, sizes: list[int], old: int) -> dict[int, np.ndarray]:
        """Length -> number of the gram of that length ending at each token (n,), UNSEEN where the tokens do not reach
        so far back; the grams that end at token `old` or later are counted."""
        numbers = {1: tokens.astype(np.uint64)}
        for size in sizes:
            (begin, end), out = self.halves[size], np.full(len(tokens), UNSEEN, np.uint64)
            pairs = numbers[begin][size - 1 - (size - begin):len(tokens) - (size - begin)] << np.uint64(32)
            pairs = pairs | numbers[end][size - 1:]
            split = max(0, old - size + 1)
            out[size - 1:] = np.concatenate([self.grams[size].find(pairs[:split]),
                                             self.grams[size].add(pairs[split:])])
            numbers[size] = out
        return numbers

    def absorb(self, tokens: np.ndarray) -> None:
        """Count the n-grams that end in these tokens (n,), which follow those of the calls before."""
        for start in range(0, len(tokens), ABSORB_TOKENS):
            part = tokens[start:start + ABSORB_TOKENS]
            joined = np.concatenate([self.tail, part])
            self._number(joined, list(self.grams), len(self.tail))
            self.unigrams += np.bincount(part, minlength=len(self.unigrams))
            self.tail = joined[max(0, len(joined) - max(self.orders) + 1):]

    def look(self, tokens: np.ndarray, count: int) -> list[Matches]:
        """For each order what followed the contexts that end at the last `count` of these tokens (n,); the ones before
        them, as far as there are any, only belong to contexts."""
        tokens = tokens[max(0, len(tokens) - count - max(self.orders) + 2):]
        sizes = [size for size in self.grams if size < max(self.orders)]
        numbers = self._number(tokens, sizes, len(tokens))
        return [self.grams[order].follow(numbers[order - 1][len(tokens) - count:]) for order in self.orders]


def chain_chances(matches: list[Matches], tokens: np.ndarray, chance: np.ndarray, discount: float) -> np.ndarray:
    """The probability of token i (S,) at position i by each order, (S, E): interpolated absolute discounting,
    P_n(v|c) = (max(N(c,v) - d, 0) + d T(c) P_{n-1}(v)) / N(c), or P_{n-1} where c was never seen. `chance` (S,) is the
    lowest one's P_1. (Kneser and Ney 1995, with plain counts in all orders.)"""
    columns = []
    for match in matches:
        pairs, place = match.which << 16 | tokens, np.zeros(len(tokens), np.int64)
        if len(match.pairs):
            place = np.minimum(np.searchsorted(match.pairs, pairs), len(match.pairs) - 1)
            found = np.where(match.pairs[place] == pairs, match.count[place] - discount, 0.0)
            total, kinds = match.total[match.which], match.kinds[match.which]
            chance = np.where(total, (found + discount * kinds * chance) / np.maximum(total, 1), chance)
        columns.append(chance)
    return np.stack(columns, 1)


class TrainingGrams:
    """n-grams of the training rows of earlier steps, the same on every rank: they say which targets are easy without a
    model, and teach the mixer head. Counting ends after NGRAM_TRAIN_TOKENS."""

    def __init__(self, config: Config, batches: Batches) -> None:
        self.alpha, self.left, self.batches = config.train.complement_alpha, config.ngram.ngram_train_tokens, batches
        self.discount = config.ngram.ngram_discount
        self.store = NgramStore(tuple(range(2, config.ngram.ngram_eval_order + 1)), config.data.vocab_size)

    def lessons(self, batch: Batch) -> Batch:
        """The batch with its lessons."""
        weights, chances, seen = [], [], []
        base = (self.store.unigrams + 1) / (self.store.unigrams + 1).sum()
        for row, targets in zip(batch.tokens.cpu().numpy(), batch.targets.cpu().numpy(), strict=True):
            matches = self.store.look(row, len(row))
            plain = chain_chances(matches[:1], targets, np.zeros(len(row)), 0.0)[:, 0]
            total = matches[0].total[matches[0].which]
            weights.append(np.maximum(0.1, 1 - self.alpha * plain * total / (total + 1)))
            chances.append(chain_chances(matches, targets, base[targets], self.discount))
            seen.append(np.stack([match.total[match.which] > 0 for match in matches], 1))
        device = batch.tokens.device
        return batch._replace(lessons=Lessons(
            torch.from_numpy(np.concatenate(weights)).to(device, torch.float32),
            torch.from_numpy(np.concatenate(chances)).to(device, torch.float32),
            torch.from_numpy(np.concatenate(seen)).to(device)))

    def absorb(self, micros: range, world: World) -> None:
        """Count the rows of these micro-batches."""
        for index in micros:
            if self.left <= 0:
                return
            batch = self.batches.micro(index, world)
            rows = torch.cat([batch.tokens, batch.targets[:, -1:]], 1).cpu().numpy()
            for row in rows:
                self.store.tail = row[:0]
                self.store.absorb(row)
            self.left -= rows.size


# What adds lessons to training batches.
TEACHERS: dict[str, Callable[..., Any]] = {"ngrams": TrainingGrams}


def teachers_of(config: Config) -> set[str]:
    """The teachers that a configuration asks for."""
    return {"ngrams"} if config.train.complement_alpha or config.model.ngram_head else set()


# ==== 06 KERNELS ============================================================================================
# One record an operation. The plain formula stands first and is the documentation; its fast twin stands below
# and must give the same values and gradients (the tests enumerate the table). To add a twin: write it under
# its reference, say when it is usable, and give the tolerances that its arithmetic justifies.


SHORT_ROWS = 256


def _repeat_heads(x: Tensor, heads: int) -> Tensor:
    """(B, T, K, C) -> (B, H, T, C): each key/value head serves H / K query heads."""
    batch, length, kv_heads, channels = x.shape
    return x.transpose(1, 2)[:, :, None].expand(batch, kv_heads, heads // kv_heads, length, channels).reshape(
        batch, heads, length, channels)


def attention_mask(docs: "Tensor | Spans | None", shape: torch.Size) -> Tensor | None:
    """(B, 1, T, T), True where a query may see a key: not later, and of the same document. None when docs is None."""
    if docs is None:
        return None
    docs = docs.docs(shape) if isinstance(docs, Spans) else docs
    causal = torch.ones(shape[1], shape[1], dtype=torch.bool, device=docs.device).tril()
    return ((docs[:, :, None] == docs[:, None, :]) & causal)[:, None]


def attention_reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax attention, (B, T, H, C). q (B, T, H, C); k, v (B, T, K, C); mask (B, 1, T, T), True where a query (row)
    may see a key (column); None is plain causal. Scores, softmax and sums in fp32 or wider."""
    wide = torch.promote_types(q.dtype, torch.float32)
    k, v = _repeat_heads(k, q.shape[2]), _repeat_heads(v, q.shape[2])
    if mask is None:
        mask = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool, device=q.device).tril()
    scores = (q.transpose(1, 2).to(wide) @ k.to(wide).mT) / math.sqrt(q.shape[-1])
    return (scores.masked_fill(~mask, -math.inf).softmax(-1) @ v.to(wide)).to(q.dtype).transpose(1, 2)


def attention_sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, flash: bool = False) -> Tensor:
    """The same through torch's scaled_dot_product_attention; short bf16 rows on a CPU as two plain products, which
    torch's CPU kernel does not beat before SHORT_ROWS (its backward is the slow half). `flash`: its flash kernel runs
    here, which needs no repeated heads (others would then build all scores)."""
    if mask is None and flash:
        return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True,
                                              enable_gqa=q.shape[2] != k.shape[2]).transpose(1, 2)
    k, v, q = _repeat_heads(k, q.shape[2]), _repeat_heads(v, q.shape[2]), q.transpose(1, 2)
    if mask is None or q.device.type != "cpu" or q.dtype != torch.bfloat16 or q.shape[2] > SHORT_ROWS:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None).transpose(1, 2)
    bias = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, -math.inf)
    return (((q * q.shape[-1] ** -0.5) @ k.mT + bias).softmax(-1) @ v).transpose(1, 2)


def _with_spans(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """attention(q, k, v, mask) that hands packed rows to `attend`(q (N, H, C), k, v (N, K, C), spans) -> (N, H, C), and
    rows that hold one document or come with a mask to torch's own."""
    def attention_spans(q: Tensor, k: Tensor, v: Tensor, mask: "Tensor | Spans | None") -> Tensor:
        if not isinstance(mask, Spans):
            return attention_sdpa(q, k, v, mask, flash=True)
        return attend(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), mask).view_as(q)
    return attention_spans


def make_attention_varlen() -> Callable[..., Tensor]:
    """The same through torch.nn.attention.varlen (FlashAttention 2 of torch, 3 where it is installed)."""
    import inspect

    from torch.nn.attention.varlen import varlen_attn
    known = inspect.signature(varlen_attn).parameters
    causal = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    gqa = {"enable_gqa": True} if "enable_gqa" in known else {}

    def attend(q: Tensor, k: Tensor, v: Tensor, where: Spans) -> Tensor:
        more = gqa if k.shape[1] != q.shape[1] else {}
        return varlen_attn(q, k, v, where.starts, where.starts, where.longest, where.longest, **causal, **more)

    return _with_spans(attend)


def make_attention_fa3() -> Callable[..., Tensor]:
    """The same through FlashAttention 3, package flash_attn_interface."""
    from flash_attn_interface import flash_attn_varlen_func

    def attend(q: Tensor, k: Tensor, v: Tensor, where: Spans) -> Tensor:
        out = flash_attn_varlen_func(q, k, v, where.starts, where.starts, where.longest, where.longest, causal=True)
        return out[0] if isinstance(out, tuple) else out

    return _with_spans(attend)


def _lacks_flash(device: torch.device, dtype: torch.dtype, settings: ModelSettings, package: str, majors: range
                 ) -> str | None:
    """Why attention of variable length is not usable: device, dtype, width of a head, package."""
    if device.type != "cuda":
        return "needs a GPU"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"needs bfloat16 or float16, not {str(dtype)[6:]}"
    major, minor = torch.cuda.get_device_capability(device)
    if major not in majors:
        return f"needs compute capability {majors[0]}.0 to {majors[-1]}.x (this is {major}.{minor})"
    heads = {own_settings(settings, block).num_heads for block in parse_stack(settings.stack)[0] if block.letter == "A"}
    if odd := [settings.model_dim // count for count in heads if settings.model_dim // count % 8 or (
            settings.model_dim // count > 256)]:
        return f"needs heads of at most 256 channels, a multiple of 8 (here {odd[0]})"
    try:
        return None if importlib.util.find_spec(package) else f"{package} is not installed"
    except ModuleNotFoundError:
        return f"{package} is not in this torch"


FLA_KEYS = 256  # key channels of a head, at most


def _lacks_fla(device: torch.device, dtype: torch.dtype, settings: ModelSettings) -> str | None:
    """Why flash-linear-attention is not usable."""
    if device.type != "cuda":
        return "needs a GPU"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"needs bfloat16 or float16, not {str(dtype)[6:]}"
    wide = [settings.model_dim * own.expand_k / own.num_heads for block in parse_stack(settings.stack)[0]
            if MIXER_KERNELS[block.letter] == "delta" for own in [own_settings(settings, block)]]
    if max(wide, default=0) > FLA_KEYS:
        return f"needs at most {FLA_KEYS} key channels a head (here {max(wide):g})"
    return None if importlib.util.find_spec("fla") else "flash-linear-attention is not installed"


Softcap = float | Tensor | Callable[[Tensor], Tensor]


def bend_poly(logits: Tensor, softcap: float) -> Tensor:
    """Logits soft-capped by the beginning of tanh's series, clipped where it reaches the bound. Source: the challenge's
    ternary record."""
    z = (logits / softcap).clamp(-2, 2)
    square = z.square()
    return softcap * (z * (1 - square / 3 + square.square() / 15)).clamp(-1, 1)


def bend(logits: Tensor, softcap: Softcap) -> Tensor:
    """Logits soft-capped: softcap * tanh(logits / softcap); a tensor (2,) holds the caps above and below 0; a function
    bends by itself."""
    if callable(softcap):
        return softcap(logits)
    if isinstance(softcap, Tensor):
        softcap = torch.where(logits > 0, *softcap.to(logits.dtype))
    elif not softcap:
        return logits
    return softcap * torch.tanh(logits / softcap)


def soft_logits(hidden: Tensor, embedding: Tensor, softcap: Softcap) -> Tensor:
    """Logits (..., V) in fp32 or wider: hidden (..., D) times the tied embedding (V, D), bent into +-softcap."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    return bend(F.linear(hidden.to(wide), embedding.to(wide)), softcap)


def mean_nats_reference(hidden: Tensor, embedding: Tensor, targets: Tensor, softcap: float | Tensor) -> Tensor:
    """Mean cross entropy in nats, a scalar: hidden (N, D), tied embedding (V, D), targets (N,) int64; softcap as in
    `bend`. Logits in fp32 or wider, of factors in hidden's dtype."""
    return F.cross_entropy(soft_logits(hidden, embedding.to(hidden.dtype), softcap), targets)


CHUNK_ROWS = 512


class _ChunkedNats(torch.autograd.Function):
    """Value and gradient in one pass over rows small enough for the cache; logits (N, V) never exist as a whole."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, embedding: Tensor, targets: Tensor, softcap: float | Tensor) -> Tensor:
        count, weight = hidden.shape[0], embedding.to(hidden.dtype)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        d_hidden, d_weight = torch.empty_like(hidden), torch.zeros_like(embedding)
        d_caps = torch.zeros_like(softcap) if isinstance(softcap, Tensor) else None
        for start in range(0, count, CHUNK_ROWS):
            rows = slice(start, start + CHUNK_ROWS)
            logits = F.linear(hidden[rows], weight).float()
            above = logits > 0 if d_caps is not None else None
            caps = softcap if above is None else torch.where(above, *softcap)
            bent = (logits / caps).tanh_() if above is not None or softcap else None
            chance = (logits if bent is None else bent * caps).log_softmax(-1)
            target = targets[rows, None]
            total -= chance.gather(1, target).sum()
            slope = chance.exp_().scatter_add_(1, target, torch.full_like(target, -1, dtype=torch.float32))
            if bent is not None:
                steep = 1 - bent.square()
                if above is not None:
                    to_caps = slope * (bent - logits / caps * steep)
                    over = torch.where(above, to_caps, 0.0).sum()
                    d_caps += torch.stack([over, to_caps.sum() - over])
                slope *= steep
            slope = slope.to(hidden.dtype)
            torch.mm(slope, weight, out=d_hidden[rows])
            d_weight += slope.mT @ hidden[rows]
        ctx.save_for_backward(d_hidden, d_weight, d_caps)
        return total / count

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor, None, Tensor | None]:
        d_hidden, d_weight, d_caps = ctx.saved_tensors
        # Gradients of the sum until here, so that no half slope is too small for its dtype.
        share = upstream / len(d_hidden)
        return ((d_hidden * share).to(d_hidden.dtype), d_weight * share, None,
                None if d_caps is None else d_caps * share)


def mean_nats_chunked(hidden: Tensor, embedding: Tensor, targets: Tensor, softcap: float | Tensor) -> Tensor:
    """The same, chunk by chunk, gradients made on the way forward."""
    return _ChunkedNats.apply(hidden, embedding, targets, softcap)


def mlp_reference(x: Tensor, up: Tensor, down: Tensor, slope: float) -> Tensor:
    """Feed-forward (..., D) -> (..., D) around a squared leaky ReLU: up (F, D) and down (D, F), fp32 masters."""
    return F.linear(F.leaky_relu(F.linear(x, up.to(x.dtype)), slope).square(), down.to(x.dtype))


def triton_lacks() -> list[str]:
    """What Triton needs and this machine has not: itself, and a C compiler for its launchers."""
    there = {"triton": importlib.util.find_spec("triton"), "a C compiler": shutil.which("gcc") or shutil.which("cc")}
    return [what for what, found in there.items() if not found]


def triton_unusable(device: torch.device, lowest: int = 8, highest: int = 99) -> str | None:
    """Why Triton's twins cannot run there, or None; lowest and highest bound the major compute capability."""
    if device.type != "cuda":
        return "needs a GPU"
    if lacking := triton_lacks():
        return f"needs {' and '.join(lacking)}"
    major, minor = torch.cuda.get_device_capability(device)
    if lowest <= major <= highest:
        return None
    return f"needs compute capability {lowest}.0 {'or later' if major < lowest else f'to {highest}.x'} " \
           f"(this is {major}.{minor})"


def wide_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of two matrices, summed and returned in fp32; half inputs stay half on a GPU, for its tensor cores."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda and a.itemsize == 2 else a.float() @ b.float()


CHUNK_LOGITS = 2**26  # fp32 logits alive at a time: 256 MiB
ROW_SHARE = 1024  # logits of a row that one warp holds
# Of the two products with an epilogue. By TMA where rows are of whole 16 bytes, by pointers elsewhere; FLAT: the next
# tile's loads start during the epilogue. Sized for the 227 KiB of shared memory of capability 9.x.
MLP_TILE = {"TMA": True, "FLAT": True, "BM": 128, "BN": 256, "BK": 64, "num_warps": 8, "num_stages": 4}


@functools.cache
def triton_twins() -> None:
    """Imports Triton and registers sixteen::mean_nats, ::mlp and ::mlp_back, each one opaque node to torch.compile.
    Called when a twin is picked, never while compiling: importing this file must not need Triton."""
    global tl, triton  # Triton looks names up in the globals of a kernel's module
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor

    def register(schema: str, forward: Any, fake: Any, backward: Any = None, save: Any = None) -> None:
        """One operation of the namespace, unless another copy of this file has registered it in this process."""
        name, types = schema.split(" ", 1)
        if not hasattr(torch.ops.sixteen, name):
            op = torch.library.custom_op(f"sixteen::{name}", forward, mutates_args=(), schema=types)
            op.register_fake(fake)
            if backward:
                op.register_autograd(backward, setup_context=save)

    @triton.jit
    def nats_row(logits, targets, nats, slope, cap, CAPPED: tl.constexpr, WIDTH: tl.constexpr,  # noqa: ANN001, ANN202
                 BLOCK: tl.constexpr):
        # One program a row. Turn 0 makes the log-sum-exp block by block, turn 1 the slopes; a row of one block stays
        # in registers in between, a longer one is read again from the cache.
        row = tl.program_id(0).to(tl.int64)
        logits, slope = logits + row * WIDTH, slope + row * WIDTH
        target = tl.load(targets + row)
        peak, total, hit = float("-inf"), 0.0, 0.0
        z = tl.zeros((BLOCK,), tl.float32)
        u = z
        for turn in tl.static_range(2):
            for start in range(0, WIDTH, BLOCK):
                at = start + tl.arange(0, BLOCK)
                if turn == 0 or WIDTH > BLOCK:
                    z = tl.load(logits + at, mask=at < WIDTH, other=float("-inf"))
                    if CAPPED:  # cap * tanh(z / cap) by way of the logistic function, whose slope does not cancel
                        u = tl.sigmoid(z * (2 / cap))
                        z = tl.where(at < WIDTH, cap * (2 * u - 1), float("-inf"))
                if turn == 0:
                    higher = tl.maximum(peak, tl.max(z, 0))
                    total = total * tl.exp(peak - higher) + tl.sum(tl.exp(z - higher), 0)
                    hit += tl.sum(tl.where(at == target, z, 0.0), 0)
                    peak = higher
                else:
                    d = tl.exp(z - peak) * (1 / total) - tl.where(at == target, 1.0, 0.0)
                    if CAPPED:
                        d *= 4 * u * (1 - u)
                    tl.store(slope + at, d.to(slope.dtype.element_ty), mask=at < WIDTH)
        tl.store(nats + row, peak + tl.log(total) - hit)

    def nats_forward(hidden: Tensor, embedding: Tensor, targets: Tensor, softcap: float) -> tuple[Tensor, ...]:
        """Mean nats, and the gradients of their sum: the mean's divisor waits for backward, so that no half slope is
        too small for its dtype."""
        (count, _), width = hidden.shape, len(embedding)
        weight, block = embedding.to(hidden.dtype), triton.next_power_of_2(width) if width <= 16384 else 4096
        nats = torch.empty(count, dtype=torch.float32, device=hidden.device)
        d_hidden, d_weight = torch.empty_like(hidden), torch.zeros_like(embedding)
        for start in range(0, count, rows := max(1, CHUNK_LOGITS // width)):
            part = hidden[start:start + rows]
            logits, slope = wide_product(part, weight.T), part.new_empty(len(part), width)
            nats_row[(len(part),)](logits, targets[start:], nats[start:], slope, softcap, softcap > 0, width, block,
                                   num_warps=min(max(block // ROW_SHARE, 1), 16))
            torch.mm(slope, weight, out=d_hidden[start:start + rows])
            d_weight += wide_product(slope.T, part)
        return nats.mean(), d_hidden, d_weight

    def nats_save(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.set_materialize_grads(False)  # no zeros as gradients of gradients
        ctx.save_for_backward(*output[1:])

    def nats_backward(ctx: Any, upstream: Tensor, *_: None) -> tuple:
        scale = upstream / len(ctx.saved_tensors[0])
        return *((d * scale).to(d.dtype) for d in ctx.saved_tensors), None, None

    register("mean_nats (Tensor hidden, Tensor embedding, Tensor targets, float softcap) -> (Tensor, Tensor, Tensor)",
             nats_forward, lambda hidden, embedding, targets, softcap: (
                 hidden.new_empty((), dtype=torch.float32), torch.empty_like(hidden), torch.empty_like(embedding)),
             nats_backward, nats_save)

    @triton.jit
    def bent_product(a, b, pre, out, M, N, K, low, BACK: tl.constexpr, TMA: tl.constexpr,  # noqa: ANN001, ANN202
                     FLAT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
        # p = a (M, K) @ b (N, K)^T, tile by tile. Forward: pre = p and out = phi(p); back: out = p * phi'(pre), where
        # phi(p) is p^2 above zero and low p^2 below. As many programs as multiprocessors share the tiles, those of one
        # row side by side: b is small enough for the L2 cache, a passes through it once.
        columns = tl.cdiv(N, BN)
        HALF: tl.constexpr = BN // 2
        for tile in tl.range(tl.program_id(0), tl.cdiv(M, BM) * columns, tl.num_programs(0), flatten=FLAT):
            m, n = tile // columns * BM, tile % columns * BN
            i, j, k = m + tl.arange(0, BM)[:, None], n + tl.arange(0, BN)[:, None], tl.arange(0, BK)[None]
            c = n + tl.arange(0, HALF)[None]
            at, left, right = i.to(tl.int64) * N + c, (i < M) & (c < N), (i < M) & (c + HALF < N)
            if BACK and TMA and not FLAT:  # these loads hide behind the products
                q = tl.load(pre + at, mask=left, other=0.0), tl.load(pre + at + HALF, mask=right, other=0.0)
            p = tl.zeros((BM, BN), tl.float32)
            for start in range(0, K, BK):
                if TMA:
                    x, y = a.load([m, start]), b.load([n, start])
                else:
                    x = tl.load(a + i.to(tl.int64) * K + start + k, mask=(i < M) & (start + k < K), other=0.0)
                    y = tl.load(b + j * K + start + k, mask=(j < N) & (start + k < K), other=0.0)
                p = tl.dot(x, y.T, p, input_precision="ieee")
            if BACK and (FLAT or not TMA):
                q = tl.load(pre + at, mask=left, other=0.0), tl.load(pre + at + HALF, mask=right, other=0.0)
            halves = tl.split(tl.permute(tl.reshape(p, (BM, 2, HALF)), (0, 2, 1)))
            for half in tl.static_range(2):  # whole tiles of pre and out would not fit beside the pipeline
                p = halves[half]
                if BACK:
                    p *= q[half] * tl.where(q[half] > 0, 2.0, 2 * low)
                else:
                    if TMA:
                        pre.store([m, n + half * HALF], p.to(pre.dtype))
                    else:
                        tl.store(pre + at + half * HALF, p.to(pre.dtype.element_ty), mask=(left, right)[half])
                    p *= p * tl.where(p > 0, 1.0, low)
                if TMA:
                    out.store([m, n + half * HALF], p.to(out.dtype))
                else:
                    tl.store(out + at + half * HALF, p.to(out.dtype.element_ty), mask=(left, right)[half])

    def launch(a: Tensor, b: Tensor, pre: Tensor, slope: float, back: bool) -> Tensor:
        """phi(pre), having written pre = a @ b^T; back: (a @ b^T) phi'(pre). (M, N) like pre."""
        out, tile = torch.empty_like(pre), dict(MLP_TILE)
        tile["num_stages"] -= back and tile["FLAT"]  # room for a tile of out that leaves while the next one comes
        blocks = {a: (tile["BM"], tile["BK"]), b: (tile["BN"], tile["BK"])} | dict.fromkeys(
            (pre, out), (tile["BM"], tile["BN"] // 2))
        tile["TMA"] &= all(t.stride(0) * t.itemsize % 16 == 0 == t.data_ptr() % 16 for t in blocks)
        seen = [TensorDescriptor.from_tensor(t, block) if tile["TMA"] and not (back and t is pre) else t
                for t, block in blocks.items()]
        grid = torch.cuda.get_device_properties(a.device).multi_processor_count if a.is_cuda else 3
        bent_product[(grid,)](*seen, *pre.shape, a.shape[1], slope * slope, back, **tile)
        return out

    def mlp_forward(x: Tensor, up: Tensor, down: Tensor, slope: float) -> tuple[Tensor, ...]:
        """Output (M, D) and, for backward, what stands before and after the bend (M, F)."""
        x, pre = x.contiguous(), x.new_empty(len(x), len(up))
        act = launch(x, up.to(x.dtype).contiguous(), pre, slope, False)
        return F.linear(act, down.to(x.dtype)), pre, act

    def mlp_save(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.set_materialize_grads(False)  # no zeros as gradients of pre and act
        ctx.save_for_backward(*inputs[:3], *output[1:])
        ctx.slope = inputs[3]

    def mlp_gradients(upstream: Tensor, x: Tensor, up: Tensor, down: Tensor, pre: Tensor, act: Tensor, slope: float,
                      weights: bool) -> tuple[Tensor, ...]:
        """Gradients of x (M, D) in its dtype, of up (F, D) and down (D, F) in fp32, empty where none is wanted."""
        upstream = upstream.contiguous()
        d_pre = launch(upstream, x.new_empty(up.shape).copy_(down.T), pre, slope, True)
        d_x = d_pre @ up.to(x.dtype)
        if not weights:
            return d_x, *(torch.empty(0, device=x.device) for _ in range(2))
        return d_x, wide_product(d_pre.T, x), wide_product(upstream.T, act)

    def mlp_backward(ctx: Any, upstream: Tensor, *_: None) -> tuple:
        weights = any(ctx.needs_input_grad[1:3])
        d_x, *d_weights = torch.ops.sixteen.mlp_back(upstream, *ctx.saved_tensors, ctx.slope, weights)
        return d_x, *(d_weights if weights else (None, None)), None

    register("mlp (Tensor x, Tensor up, Tensor down, float slope) -> (Tensor, Tensor, Tensor)", mlp_forward,
             lambda x, up, down, slope: tuple(x.new_empty(len(x), len(w)) for w in (down, up, up)),
             mlp_backward, mlp_save)
    register("mlp_back (Tensor upstream, Tensor x, Tensor up, Tensor down, Tensor pre, Tensor act, float slope, "
             "bool weights) -> (Tensor, Tensor, Tensor)", mlp_gradients,
             lambda upstream, x, up, down, pre, act, slope, weights: (x.new_empty(x.shape), *(
                 torch.empty(w.shape if weights else 0, dtype=torch.float32, device=w.device) for w in (up, down))))


def mean_nats_triton(hidden: Tensor, embedding: Tensor, targets: Tensor, softcap: float) -> Tensor:
    """The same on a GPU: cuBLAS for the products, one kernel between them that reads fp32 logits once."""
    return torch.ops.sixteen.mean_nats(hidden, embedding, targets, softcap)[0]


def mlp_triton(x: Tensor, up: Tensor, down: Tensor, slope: float) -> Tensor:
    """The same with the bend inside the products beside it."""
    return torch.ops.sixteen.mlp(x.reshape(-1, x.shape[-1]), up, down, slope)[0].view(*x.shape[:-1], -1)


def experts_reference(x: Tensor, ups: Tensor, downs: Tensor, chosen: Tensor, shares: Tensor,
                      inner: Callable[[Tensor], Tensor]) -> Tensor:
    """Each token through the experts it chose: x (N, D), ups (E, F, D), downs (E, D, F), chosen (N, k) numbers of
    experts, shares (N, k) of what they find; `inner` bends hidden values (..., F) -> (N, D). Every expert sees all
    tokens here."""
    out = torch.zeros_like(x)
    for expert, (up, down) in enumerate(zip(ups, downs, strict=True)):
        found = F.linear(inner(F.linear(x, up.to(x.dtype))), down.to(x.dtype))
        out = out + ((chosen == expert).to(x.dtype) * shares.to(x.dtype)).sum(1, keepdim=True) * found
    return out


def experts_grouped(x: Tensor, ups: Tensor, downs: Tensor, chosen: Tensor, shares: Tensor,
                    inner: Callable[[Tensor], Tensor]) -> Tensor:
    """The same with tokens sorted by expert, so that each goes through its own alone. No token is dropped, no shape
    hangs on what is chosen, and the host is not waited for. A compiled graph knows grouped products of bf16 alone; one
    of fp32 holds the reference."""
    if torch.compiler.is_compiling() and x.dtype != torch.bfloat16:
        return experts_reference(x, ups, downs, chosen, shares, inner)
    flat = chosen.flatten()
    order = flat.argsort(stable=True)
    ends = (flat[:, None] == torch.arange(len(ups), device=x.device)).sum(0).cumsum(0).to(torch.int32)
    rows = x[order // chosen.shape[1]]  # (N k, D)
    hidden = inner(F.grouped_mm(rows, ups.to(x.dtype).mT, offs=ends))
    found = F.grouped_mm(hidden, downs.to(x.dtype).mT, offs=ends)[order.argsort()].unflatten(0, chosen.shape)
    return (found * shares.to(x.dtype)[..., None]).sum(1)


def _lacks_grouped(device: torch.device, dtype: torch.dtype, settings: ModelSettings) -> str | None:
    """Why grouped products cannot run there, or None."""
    if settings.model_dim % EXPERT_STEP:
        return f"MODEL_DIM={settings.model_dim} is not a multiple of {EXPERT_STEP}"
    if not hasattr(F, "grouped_mm"):
        return "needs a torch with grouped_mm"
    if device.type != "cuda":
        return None if dtype in (torch.float32, torch.bfloat16) else f"no grouped products in {str(dtype)[6:]}"
    if torch.cuda.get_device_capability(device)[0] >= 10:
        return "gradients of experts without tokens are not zero there (pytorch issue 172439)"
    return triton_unusable(device) if dtype == torch.bfloat16 else "needs bf16"


# -- in-place test-time training: what the tokens of a chunk write into a matrix, later chunks of the document read


def written_shares(count: int, momentum: float, decay: float) -> list[float]:
    """How much of what a chunk wrote stands in the matrix 0, 1, ... count - 1 chunks later; none in itself."""
    shares, again = [0.0], 1.0
    for _ in range(count - 1):
        shares.append(decay * shares[-1] + again)
        again *= momentum
    return shares[:count]


def written_reference(z: Tensor, v: Tensor, where: "Tensor | Spans | None", size: int, momentum: float, decay: float
                      ) -> Tensor:
    """sum_j g v_j (z_j . z_i) over the tokens j of earlier chunks of the document, g of written_shares: z (B, T, F),
    v (B, T, D) -> (B, T, D). Source: In-Place TTT, arXiv 2604.06169, in its dual form."""
    docs, chunk = _numbers(where, z.shape[:2]), torch.arange(z.shape[1], device=z.device) // size
    shares = torch.tensor(written_shares(-(-z.shape[1] // size), momentum, decay), device=z.device, dtype=z.dtype)
    weight = shares[(chunk[:, None] - chunk).clamp_min(0)]
    if docs is not None:
        weight = weight * (docs[:, :, None] == docs[:, None, :])
    return (z @ z.mT * weight) @ v


def written_chunked(z: Tensor, v: Tensor, where: "Tensor | Spans | None", size: int, momentum: float, decay: float
                    ) -> Tensor:
    """The same from chunk to chunk: what is written is a matrix (B, F, D), and belongs to one document."""
    docs, out = _numbers(where, z.shape[:2]), []
    held = again = z.new_zeros(len(z), z.shape[2], v.shape[2])
    owner = None if docs is None else docs[:, :1]
    for begin in range(0, z.shape[1], size):
        part = slice(begin, begin + size)
        keys, values = z[:, part], v[:, part]
        read = keys @ held
        if docs is not None:
            own, last = docs[:, part], docs[:, part][:, -1:]
            read, values = read * (own == owner)[..., None], values * (own == last)[..., None]
            held, again, owner = held * (last == owner)[..., None], again * (last == owner)[..., None], last
        out.append(read)
        again = momentum * again + keys.mT @ values
        held = decay * held + again
    return torch.cat(out, 1)


# -- retrieval: what followed the states that are most like the own one


def recalled_reference(codes: Tensor, stream: Tensor, where: "Tensor | Spans | None", top: int, sharp: Tensor,
                       new: int) -> Tensor:
    """For the last `new` of L positions with fp32 codes (B, L, K) of -1 and 1: the mean of the stream (B, L, D) one
    behind the `top` earlier positions of the document whose codes agree most, of equal ones the nearest, weighed by the
    softmax of sharp times how much they agree; zeros where there is none yet. (B, new, D)."""
    docs, length = _numbers(where, codes.shape[:2]), codes.shape[1]
    own, place = codes[:, length - new:], torch.arange(length, device=codes.device)
    earlier = (place < place[length - new:, None])[None]
    if docs is not None:
        earlier = earlier & (docs[:, length - new:, None] == docs[:, None, :])
    alike = own @ codes.mT
    key = (alike.detach().round().long() + codes.shape[-1]) * length + place
    best, at = key.masked_fill(~earlier, -1).topk(min(top, length), -1)  # (B, new, top)
    shares = (sharp.float() / codes.shape[-1] * alike.gather(-1, at)).masked_fill(best < 0, -1e9).softmax(-1)
    behind = stream.gather(1, (at + 1).clamp_max(length - 1).flatten(1)[..., None].expand(-1, -1, stream.shape[-1]))
    return (behind.unflatten(1, at.shape[1:]) * (shares * (best >= 0)).to(stream.dtype)[..., None]).sum(-2)


# -- recurrences: a state a head, reset at every document. Gates, sums of logarithms, solves and states in fp32 or more.
# The token loop is the definition; the chunked form cuts rows into chunks of C tokens, N a row, does what stays within
# a chunk for all of them at once, and walks only from chunk to chunk. Every one takes its inputs, `where` (documents
# (B, T), spans, or None for one document a row), a state to go on from (None: zeros) and C, and returns (B, T, H, V)
# and the state at the end.


class Chunks(NamedTuple):
    """Who belongs together in rows cut into chunks: `same` (B or 1, 1, N, C, C), a position (row) and an earlier or the
    own one (column) of its document; `enters` (B or 1, 1, N, C), positions of the document that the chunk before ended
    with."""
    same: Tensor
    enters: Tensor


def _numbers(where: "Tensor | Spans | None", shape: torch.Size) -> Tensor | None:
    """Documents (B, T) as numbers, or None."""
    return where.docs(shape) if isinstance(where, Spans) else where


def cut_chunks(x: Tensor, size: int) -> Tensor:
    """(B, T, H, ...) as (B, H, N, C, ...), with zeros behind the last token."""
    x = F.pad(x, (*([0, 0] * (x.ndim - 2)), 0, -x.shape[1] % size))
    return x.unflatten(1, (-1, size)).movedim(3, 1)


def join_chunks(x: Tensor, length: int) -> Tensor:
    """(B, H, N, C, V) as (B, T, H, V)."""
    return x.movedim(1, 3).flatten(1, 2)[:, :length]


def ends(x: Tensor, length: int) -> Tensor:
    """x (B, H, N, C, ...) at the last token of each chunk, (B, H, N, ...): behind the end of the row nothing counts."""
    return torch.cat([x[:, :, :-1, -1], x[:, :, -1:, (length - 1) % x.shape[3]]], 2)


def make_chunks(where: "Tensor | Spans | None", like: Tensor, size: int) -> Chunks:
    """The chunks of rows shaped as `like` (B, T, ...)."""
    docs = _numbers(where, like.shape[:2])
    causal = torch.ones(size, size, dtype=torch.bool, device=like.device).tril()
    if docs is None:
        count = -(-like.shape[1] // size)
        return Chunks(causal.expand(1, 1, count, size, size), causal[-1].expand(1, 1, count, size))
    docs = torch.cat([docs, docs[:, -1:].expand(-1, -docs.shape[1] % size)], 1).unflatten(1, (-1, size))  # (B, N, C)
    before = torch.cat([docs[:, :1, 0], docs[:, :-1, -1]], 1)
    return Chunks(((docs[..., :, None] == docs[..., None, :]) & causal)[:, None], (docs == before[..., None])[:, None])


def sums(x: Tensor, chunks: Chunks) -> Tensor:
    """Sums of x (B, H, N, C) from the beginning of the chunk, or of the document in it, to each position."""
    return (chunks.same.to(x.dtype) @ x[..., None])[..., 0]


def decays(total: Tensor, same: Tensor) -> Tensor:
    """exp(c_i - c_j) where `same`, else 0, from sums of logarithms c (..., C). Masked before exp, whose gradient would
    else be infinity times 0."""
    return (total[..., :, None] - total[..., None, :]).masked_fill(~same, -math.inf).exp()


def entering(total: Tensor, chunks: Chunks) -> Tensor:
    """exp(c_i) (B, H, N, C): what is left at each position of the state that enters the chunk."""
    return total.masked_fill(~chunks.enters, -math.inf).exp()


def _begins(where: "Tensor | Spans | None", like: Tensor) -> list[Tensor]:
    """For each position of the token loop, whether its document goes on, (B or 1, 1, 1, 1)."""
    docs = _numbers(where, like.shape[:2])
    if docs is None:
        return [torch.ones(1, 1, 1, 1, dtype=torch.bool, device=like.device)] * like.shape[1]
    goes_on = torch.cat([torch.ones_like(docs[:, :1], dtype=torch.bool), docs[:, 1:] == docs[:, :-1]], 1)
    return list(goes_on[..., None, None, None].unbind(1))


def delta_reference(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, decay: Tensor | None,
                    where: "Tensor | Spans | None" = None, state: Tensor | None = None, size: int = 0
                    ) -> tuple[Tensor, Tensor]:
    """The delta rule with decay: S <- e^g S + beta k (v - e^g S^T k)^T, read after the write by q / sqrt(K). q, k
    (B, T, H, K), v (B, T, H, V); beta (B, T, H); decay g (B, T, H) at most 0, None is 0; state (B, H, K, V). Sources:
    Yang et al. 2024, Parallelizing Linear Transformers with the Delta Rule, and Gated Delta Networks."""
    wide = torch.promote_types(q.dtype, torch.float32)
    q, k, v, beta = (x.to(wide) for x in (q / math.sqrt(q.shape[-1]), k, v, beta))
    state = q.new_zeros(*k.shape[:1], *k.shape[2:], v.shape[-1]) if state is None else state
    out = []
    for t, goes_on in enumerate(_begins(where, q)):
        state = state * goes_on
        if decay is not None:
            state = decay[:, t, :, None, None].to(wide).exp() * state
        wrong = v[:, t] - (state * k[:, t, ..., None]).sum(-2)  # (B, H, V)
        state = state + (beta[:, t, :, None] * k[:, t])[..., None] * wrong[..., None, :]
        out.append((state * q[:, t, ..., None]).sum(-2))
    return torch.stack(out, 1), state


def delta_chunked(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, decay: Tensor | None,
                  where: "Tensor | Spans | None" = None, state: Tensor | None = None, size: int = 64
                  ) -> tuple[Tensor, Tensor]:
    """The same by chunks: what all writes of a chunk correct in each other is one triangular solve."""
    chunks, length, wide = make_chunks(where, q, size), q.shape[1], torch.promote_types(q.dtype, torch.float32)
    q, k, v, beta = (cut_chunks(x.to(wide), size) for x in (q / math.sqrt(q.shape[-1]), k, v, beta))
    if decay is None:
        among, enter = chunks.same.to(wide), chunks.enters.to(wide)
    else:
        total = sums(cut_chunks(decay.to(wide), size), chunks)
        among, enter = decays(total, chunks.same), entering(total, chunks)
    right = beta[..., None] * torch.cat([v, enter[..., None] * k], -1)
    solved = torch.linalg.solve_triangular(beta[..., None] * (k @ k.mT) * among, right, upper=False, unitriangular=True)
    ours, theirs = solved.split([v.shape[-1], k.shape[-1]], -1)
    into = (ends(among, length)[..., None] * k).mT
    stay = ends(enter, length)[..., None, None].expand(*k.shape[:3], 1, 1)
    state = k.new_zeros(*k.shape[:2], k.shape[-1], v.shape[-1]) if state is None else state
    states, written = [], []
    for n in range(k.shape[2]):
        states.append(state)
        written.append(ours[:, :, n] - theirs[:, :, n] @ state)
        state = stay[:, :, n] * state + into[:, :, n] @ written[-1]
    out = (enter[..., None] * q) @ torch.stack(states, 2) + ((q @ k.mT) * among) @ torch.stack(written, 2)
    return join_chunks(out, length), state


@functools.cache
def make_delta_fla() -> Callable[..., tuple[Tensor, Tensor]]:
    """The same through flash-linear-attention in 16 bits, for spans and rows of one document; a state to go on
    from takes the chunked form. An operation that is opaque to the compiler; its backward makes the forward again."""
    from fla.ops.delta_rule import chunk_delta_rule
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    half = torch.float16 if torch.cuda.is_available() and not torch.cuda.is_bf16_supported(False) else torch.bfloat16

    def call(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, decay: Tensor | None, starts: Tensor | None
             ) -> tuple[Tensor, Tensor]:
        # Nothing is cast here: inside an operation only the library's own function is differentiated.
        rule = chunk_delta_rule if decay is None else functools.partial(chunk_gated_delta_rule, g=decay)
        return rule(q, k, v, beta=beta, scale=q.shape[-1] ** -0.5, output_final_state=True,
                    cu_seqlens=None if starts is None else starts.long())

    @torch.library.custom_op("sixteen::delta_fla", mutates_args=())
    def forward(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, decay: Tensor | None, starts: Tensor | None
                ) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            out, state = call(q, k, v, beta, decay, starts)
        if starts is not None:  # the last span that holds something
            state = state.index_select(0, (starts[1:] > starts[:-1]).sum(dim=0, keepdim=True) - 1)
        return out.contiguous(), state.float()

    @forward.register_fake
    def _(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, decay: Tensor | None, starts: Tensor | None
          ) -> tuple[Tensor, Tensor]:
        return torch.empty_like(v), v.new_empty(k.shape[0], k.shape[2], k.shape[3], v.shape[3], dtype=torch.float32)

    @torch.library.custom_op("sixteen::delta_fla_backward", mutates_args=())
    def backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, decay: Tensor | None,
                 starts: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        with torch.enable_grad():
            inputs = [x.detach().requires_grad_() for x in (q, k, v, beta, decay) if x is not None]
            out, _ = call(*inputs[:4], inputs[4] if decay is not None else None, starts)
            found = torch.autograd.grad(out, inputs, grad.to(out.dtype))
        return (*(x.contiguous() for x in found), *([] if decay is not None else [beta.new_empty(0)]))

    @backward.register_fake
    def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, decay: Tensor | None, starts: Tensor | None
          ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return (*(torch.empty_like(x) for x in (q, k, v, beta)),
                beta.new_empty(0) if decay is None else torch.empty_like(decay))

    def setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.gated, ctx.packed = inputs[4] is not None, inputs[5] is not None
        ctx.save_for_backward(*(x for x in inputs if x is not None))

    def differentiate(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        held = list(ctx.saved_tensors)
        starts = held.pop() if ctx.packed else None
        found = backward(grad, *held[:4], held[4] if ctx.gated else None, starts)
        return (*found[:4], found[4] if ctx.gated else None, None)

    forward.register_autograd(differentiate, setup_context=setup)

    def delta_fla(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, decay: Tensor | None,
                  where: "Tensor | Spans | None" = None, state: Tensor | None = None, size: int = 64
                  ) -> tuple[Tensor, Tensor]:
        if isinstance(where, Tensor) or state is not None:  # no model of packed rows asks for this
            return delta_chunked(q, k, v, beta, decay, where, state, size)
        gates = [beta.to(half), None if decay is None else decay.float()]
        held = [q.to(half), k.to(half), v.to(half), *gates]
        if where is None:
            return forward(*held, None)
        rows = [x if x is None else x.flatten(0, 1)[None] for x in held]  # rows behind each other, as spans count them
        out, after = forward(*rows, where.starts)
        return out.view_as(v), after

    return delta_fla


def mlstm_reference(q: Tensor, k: Tensor, v: Tensor, enter: Tensor, forget: Tensor,
                    where: "Tensor | Spans | None" = None, state: tuple[Tensor, Tensor] | None = None, size: int = 0
                    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """mLSTM with raw gates i, f (B, T, H): C <- sigmoid(f) C + e^i k (v, 1)^T, read as q^T C / max(|n^T q|, 1), n being
    the column of the 1, q / sqrt(K); all divided by e^m, m the running maximum of the gates' logarithms, on which the
    result does not depend. State: (C (B, H, K, V + 1), m (B, H)). Source: Beck et al. 2024, xLSTM."""
    wide = torch.promote_types(q.dtype, torch.float32)
    q, k, v, enter, forget = (x.to(wide) for x in (q / math.sqrt(q.shape[-1]), k, v, enter, forget))
    kept, values = F.logsigmoid(forget), torch.cat([v, torch.ones_like(v[..., :1])], -1)
    total, top = state or (q.new_zeros(*k.shape[:1], *k.shape[2:], values.shape[-1]),
                           q.new_full((k.shape[0], k.shape[2]), MLSTM_NOTHING))
    out = []
    for t, goes_on in enumerate(_begins(where, q)):
        total, top = total * goes_on, torch.where(goes_on[..., 0, 0], top, MLSTM_NOTHING)
        before, top = top, torch.maximum(kept[:, t] + top, enter[:, t]).detach()
        total = (kept[:, t] + before - top).exp()[..., None, None] * total + (
            (enter[:, t] - top).exp()[..., None] * k[:, t])[..., None] * values[:, t, :, None]
        read = (total * q[:, t, ..., None]).sum(-2)  # (B, H, V + 1)
        out.append(read[..., :-1] / torch.maximum(read[..., -1].abs(), (-top).exp())[..., None])
    return torch.stack(out, 1), (total, top)


MLSTM_NOTHING = -1e30  # logarithm of the scale of a state that holds nothing


def mlstm_chunked(q: Tensor, k: Tensor, v: Tensor, enter: Tensor, forget: Tensor,
                  where: "Tensor | Spans | None" = None, state: tuple[Tensor, Tensor] | None = None, size: int = 64
                  ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """The same by chunks; a chunk's positions are scaled by their own maximum, its state by that at its end."""
    chunks, length, wide = make_chunks(where, q, size), q.shape[1], torch.promote_types(q.dtype, torch.float32)
    q, k, v, enter, kept = (cut_chunks(x.to(wide), size) for x in (
        q / math.sqrt(q.shape[-1]), k, v, enter, F.logsigmoid(forget.to(wide))))
    values, total = torch.cat([v, torch.ones_like(v[..., :1])], -1), sums(kept, chunks)
    among = (total[..., :, None] - total[..., None, :] + enter[..., None, :]).masked_fill(~chunks.same, -math.inf)
    entered = total.masked_fill(~chunks.enters, -math.inf)
    last, left = ends(among, length), ends(entered, length)  # (B, H, N, C), (B, H, N)
    held, top = state or (k.new_zeros(*k.shape[:2], k.shape[-1], values.shape[-1]),
                          k.new_full(k.shape[:2], MLSTM_NOTHING))
    with torch.no_grad():
        tops = [top]
        for n in range(k.shape[2]):
            tops.append(torch.maximum(left[:, :, n] + tops[-1], last[:, :, n].amax(-1)))
        tops = torch.stack(tops, 2)
        own = torch.maximum(entered + tops[..., :-1, None], among.amax(-1))  # (B, H, N, C)
    stay = (left + tops[..., :-1] - tops[..., 1:]).exp()[..., None, None]
    into = (k * (last - tops[..., 1:, None]).exp()[..., None]).mT @ values
    states = []
    for n in range(k.shape[2]):
        states.append(held)
        held = stay[:, :, n] * held + into[:, :, n]
    read = (q * (entered + tops[..., :-1, None] - own).exp()[..., None]) @ torch.stack(states, 2) + (
        (q @ k.mT) * (among - own[..., None]).exp()) @ values
    out = read[..., :-1] / torch.maximum(read[..., -1].abs(), (-own).exp())[..., None]
    return join_chunks(out, length), (held, tops[..., -1])


LEAST_SHARE = 1e-6  # of what is kept and of the momentum, whose logarithms are taken


def titans_reference(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, momentum: Tensor, rate: Tensor,
                     where: "Tensor | Spans | None" = None, state: tuple[Tensor, Tensor] | None = None, size: int = 0
                     ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """A linear Titans memory M, learning k -> v at every token by gradient descent on half the squared error with
    momentum and forgetting: S <- momentum S + rate k (v - M^T k)^T, M <- keep M + S, read as M^T q. Gates (B, T, H) in
    [0, 1]; q, k (B, T, H, K), v (B, T, H, V); state (M, S), each (B, H, K, V). Source: Behrouz et al. 2024, Titans."""
    wide = torch.promote_types(q.dtype, torch.float32)
    q, k, v, keep, momentum, rate = (x.to(wide) for x in (q, k, v, keep, momentum, rate))
    keep, momentum = (x.clamp_min(LEAST_SHARE)[..., None, None] for x in (keep, momentum))
    zeros = q.new_zeros(*k.shape[:1], *k.shape[2:], v.shape[-1])
    memory, speed = state or (zeros, zeros)
    out = []
    for t, goes_on in enumerate(_begins(where, q)):
        memory, speed = memory * goes_on, speed * goes_on
        wrong = v[:, t] - (memory * k[:, t, ..., None]).sum(-2)
        speed = momentum[:, t] * speed + (rate[:, t, :, None] * k[:, t])[..., None] * wrong[..., None, :]
        memory = keep[:, t] * memory + speed
        out.append((memory * q[:, t, ..., None]).sum(-2))
    return torch.stack(out, 1), (memory, speed)


class Descent(NamedTuple):
    """How gradient steps with momentum and forgetting add up in chunks: `weight` (B, H, N, C, C) of the step at j in
    the memory at i, `speed` (..., C, C) in the momentum at i; what is left of the memory (`kept`) and of the momentum
    (`pushed`) that entered the chunk in the memory at i, and of the momentum in the momentum at i (`slowed`)."""
    weight: Tensor
    speed: Tensor
    kept: Tensor
    pushed: Tensor
    slowed: Tensor


def descend(keep: Tensor, momentum: Tensor, rate: Tensor, chunks: Chunks) -> Descent:
    """Descent from gates (B, H, N, C)."""
    kept, slowed = (sums(x.clamp_min(LEAST_SHARE).log(), chunks) for x in (keep, momentum))
    memory, speed = decays(kept, chunks.same), decays(slowed, chunks.same) * rate[..., None, :]
    left = entering(slowed, chunks)
    return Descent(memory @ speed, speed, entering(kept, chunks), (memory @ left[..., None])[..., 0], left)


def titans_chunked(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, momentum: Tensor, rate: Tensor,
                   where: "Tensor | Spans | None" = None, state: tuple[Tensor, Tensor] | None = None, size: int = 64
                   ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """The same by chunks: the errors of a chunk solve one triangular system."""
    chunks, length, wide = make_chunks(where, q, size), q.shape[1], torch.promote_types(q.dtype, torch.float32)
    q, k, v, *gates = (cut_chunks(x.to(wide), size) for x in (q, k, v, keep, momentum, rate))
    steps = descend(*gates, chunks)
    # An error is taken at the memory one token before, which at the beginning of a document is empty.
    before = F.pad(steps.weight[..., :-1, :], (0, 0, 1, 0)) * chunks.same
    enters = chunks.enters.to(wide)
    kept = F.pad(steps.kept[..., :-1], (1, 0), value=1.0) * enters
    pushed = F.pad(steps.pushed[..., :-1], (1, 0)) * enters
    right = torch.cat([v, kept[..., None] * k, pushed[..., None] * k], -1)
    solved = torch.linalg.solve_triangular((k @ k.mT) * before, right, upper=False, unitriangular=True)
    ours, by_memory, by_speed = solved.split([v.shape[-1], k.shape[-1], k.shape[-1]], -1)
    into = torch.cat([ends(x, length)[..., None] * k for x in (steps.weight, steps.speed)], -1).mT
    last = [ends(x, length)[..., None, None] for x in (steps.kept, steps.pushed, steps.slowed)]
    zeros = k.new_zeros(*k.shape[:2], k.shape[-1], v.shape[-1])
    memory, speed = state or (zeros, zeros)
    memories, speeds, wrong = [], [], []
    for n in range(k.shape[2]):
        memories.append(memory)
        speeds.append(speed)
        wrong.append(ours[:, :, n] - by_memory[:, :, n] @ memory - by_speed[:, :, n] @ speed)
        learned, quicker = (into[:, :, n] @ wrong[-1]).chunk(2, -2)
        memory, speed = (last[0][:, :, n] * memory + last[1][:, :, n] * speed + learned,
                         last[2][:, :, n] * speed + quicker)
    out = (steps.kept[..., None] * q) @ torch.stack(memories, 2) + (steps.pushed[..., None] * q) @ torch.stack(
        speeds, 2) + ((q @ k.mT) * steps.weight) @ torch.stack(wrong, 2)
    return join_chunks(out, length), (memory, speed)


Deep = tuple[Tensor, Tensor, Tensor, Tensor]  # what a memory learned, (B, H, F, K) and (B, H, V, F), and its momenta


def deep_reference(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, momentum: Tensor, rate: Tensor, first: Tensor,
                   second: Tensor, where: "Tensor | Spans | None" = None, state: Deep | None = None, size: int = 64
                   ) -> tuple[Tensor, Deep]:
    """A Titans memory with a hidden layer, M(k) = (second + V) silu((first + U) k), whose U and V learn by gradient
    descent on the squared error with momentum, and are forgotten: the memory fades to its start `first` (H, F, K),
    `second` (H, V, F), not to zero, where no gradient would bring it back. All tokens of a chunk take their gradients
    at the weights that entered it, those of a document that begins in it at its start. Reads after the write. State:
    U, V and their momenta."""
    wide = torch.promote_types(q.dtype, torch.float32)
    q, k, v, keep, momentum, rate, first, second = (
        x.to(wide) for x in (q, k, v, keep, momentum, rate, first, second))
    keep, momentum = (x.clamp_min(LEAST_SHARE)[..., None, None] for x in (keep, momentum))
    zeros = [torch.zeros_like(w).expand(q.shape[0], *w.shape) for w in (first, second)] * 2
    now = list(state or zeros)
    out, frozen = [], now[:2]
    for t, goes_on in enumerate(_begins(where, q)):
        if t % size == 0:
            frozen = now[:2]
        frozen, now = [x * goes_on for x in frozen], [x * goes_on for x in now]
        inner, outer = first + frozen[0], second + frozen[1]
        raw = (inner * k[:, t, :, None]).sum(-1)  # (B, H, F)
        wrong = 2 * ((outer * F.silu(raw)[..., None, :]).sum(-1) - v[:, t])  # (B, H, V)
        slopes = (((outer * wrong[..., None]).sum(-2) * silu_slope(raw))[..., None] * k[:, t, :, None],
                  wrong[..., None] * F.silu(raw)[..., None, :])
        for at, slope in enumerate(slopes):
            now[at + 2] = momentum[:, t] * now[at + 2] - rate[:, t, :, None, None] * slope
            now[at] = keep[:, t] * now[at] + now[at + 2]
        hidden = F.silu(((first + now[0]) * q[:, t, :, None]).sum(-1))
        out.append(((second + now[1]) * hidden[..., None, :]).sum(-1))
    return torch.stack(out, 1), tuple(now)


def silu_slope(x: Tensor) -> Tensor:
    """The derivative of silu."""
    share = x.sigmoid()
    return share * (1 + x * (1 - share))


def deep_chunked(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, momentum: Tensor, rate: Tensor, first: Tensor,
                 second: Tensor, where: "Tensor | Spans | None" = None, state: Deep | None = None, size: int = 64
                 ) -> tuple[Tensor, Deep]:
    """The same by chunks in its dual form: no weights a token are made, only products of tokens with each other."""
    chunks, length, wide = make_chunks(where, q, size), q.shape[1], torch.promote_types(q.dtype, torch.float32)
    q, k, v, *gates = (cut_chunks(x.to(wide), size) for x in (q, k, v, keep, momentum, rate))
    first, second, steps = first.to(wide), second.to(wide), descend(*gates, chunks)
    last = [ends(x, length)[..., None, None] for x in (steps.kept, steps.pushed, steps.slowed)]
    learns, quickens = (ends(x, length)[..., None] for x in (steps.weight, steps.speed))
    u, w, quick_u, quick_w = state or [torch.zeros_like(x).expand(q.shape[0], *x.shape) for x in (first, second)] * 2
    out = []
    for n in range(k.shape[2]):
        qn, kn, vn, weight = q[:, :, n], k[:, :, n], v[:, :, n], steps.weight[:, :, n]
        go = chunks.enters[:, :, n, :, None].to(wide)
        left, pushed = steps.kept[:, :, n, :, None], steps.pushed[:, :, n, :, None]
        raw = kn @ first.mT + go * (kn @ u.mT)  # (B, H, C, F)
        hidden = F.silu(raw)
        wrong = 2 * (hidden @ second.mT + go * (hidden @ w.mT) - vn)
        inner = (wrong @ second + go * (wrong @ w)) * silu_slope(raw)
        asked = F.silu(qn @ first.mT + left * (qn @ u.mT) + pushed * (qn @ quick_u.mT)
                       - (weight * (qn @ kn.mT)) @ inner)
        out.append(asked @ second.mT + left * (asked @ w.mT) + pushed * (asked @ quick_w.mT)
                   - (weight * (asked @ hidden.mT)) @ wrong)
        stays, goes, slows = (x[:, :, n] for x in last)
        learn, quicken = learns[:, :, n], quickens[:, :, n]
        u, quick_u = (stays * u + goes * quick_u - (learn * inner).mT @ kn, slows * quick_u - (quicken * inner).mT @ kn)
        w, quick_w = (stays * w + goes * quick_w - (learn * wrong).mT @ hidden,
                      slows * quick_w - (quicken * wrong).mT @ hidden)
    return join_chunks(torch.stack(out, 2), length), (u, w, quick_u, quick_w)


def _made(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A Triton twin, with its operations registered."""
    triton_twins()
    return function


class Twin(NamedTuple):
    """A fast form of an operation: what makes its function, and why it is not usable on a device with a dtype for a
    model (None: it is)."""
    make: Callable[[], Callable[..., Tensor]]
    unusable: Callable[[torch.device, torch.dtype, ModelSettings], str | None]
    packed: bool = False  # wants packed rows with spans


class Kernel(NamedTuple):
    """An operation: reference, twins of which the first usable one is taken, fp32 tolerances."""
    reference: Callable[..., Tensor]
    twins: dict[str, Twin]
    value_tolerance: float
    gradient_tolerance: float
    mixes: bool = True  # positions, so that packed rows must be told to it
    walks: bool = True  # from chunk to chunk, which a compiled graph holds one by one


KERNELS: dict[str, Kernel] = {
    "attention": Kernel(attention_reference, {
        "fa3": Twin(make_attention_fa3, lambda device, dtype, settings: _lacks_flash(
            device, dtype, settings, "flash_attn_interface", range(9, 10)), packed=True),
        "varlen": Twin(make_attention_varlen, lambda device, dtype, settings: _lacks_flash(
            device, dtype, settings, "torch.nn.attention.varlen", range(8, 100)), packed=True),
        "sdpa": Twin(lambda: attention_sdpa, lambda device, dtype, settings: None)}, 2e-6, 2e-5),
    "mean_nats": Kernel(mean_nats_reference, {
        "triton": Twin(lambda: _made(mean_nats_triton), lambda device, dtype, settings: triton_unusable(device, 7) or (
            "learned bounds, bias and polynomial of the logits are not in it" if settings.asym_logit_rescale or
            not plain_head(settings) else None)),
        "chunked": Twin(lambda: mean_nats_chunked, lambda device, dtype, settings: (
            "its chunks are sized for a CPU's cache" if device.type != "cpu" else None if plain_head(settings) else
            "bias and polynomial of the logits are not in it"))}, 2e-6, 2e-6),
    "mlp": Kernel(mlp_reference, {
        "triton": Twin(lambda: _made(mlp_triton), lambda device, dtype, settings: triton_unusable(device, 9, 10) or (
            "fp32 has no tensor cores" if dtype == torch.float32 else None if plain_mlp(settings) else
            "another activation and a norm inside are not in it"))}, 2e-6, 2e-6),
    "delta": Kernel(delta_reference, {
        "fla": Twin(make_delta_fla, lambda device, dtype, settings: _lacks_fla(device, dtype, settings), packed=True),
        "chunked": Twin(lambda: delta_chunked, lambda device, dtype, settings: None)}, 1e-5, 1e-5),
    "mlstm": Kernel(mlstm_reference, {"chunked": Twin(lambda: mlstm_chunked, lambda device, dtype, settings: None)},
                    5e-4, 5e-4),
    "titans": Kernel(titans_reference, {
        "chunked": Twin(lambda: titans_chunked, lambda device, dtype, settings: None)}, 2e-5, 2e-4),
    "deep": Kernel(deep_reference, {"chunked": Twin(lambda: deep_chunked, lambda device, dtype, settings: None)},
                   2e-5, 2e-4),
    "experts": Kernel(experts_reference, {
        "grouped": Twin(lambda: experts_grouped, _lacks_grouped)},
        2e-6, 2e-6, False),
    "written": Kernel(written_reference, {
        "chunked": Twin(lambda: written_chunked, lambda device, dtype, settings: None)}, 2e-5, 2e-5),
    "recalled": Kernel(recalled_reference, {}, 0.0, 0.0, walks=False),
}


def plain_head(settings: ModelSettings) -> bool:
    """Whether the loss is that of mean_nats: logits without bias, bent by tanh."""
    return settings.softcap_type == "tanh" and not settings.logit_bias


def plain_mlp(settings: ModelSettings) -> bool:
    """Whether the feed-forward is that of mlp: two matrices around a squared leaky ReLU."""
    return settings.mlp_act == "relu_sq" and not (settings.extra_norms or settings.hgf_rank or settings.act_int8)


def kernels_of(settings: ModelSettings) -> list[str]:
    """The rows of KERNELS that a model needs."""
    mixers = {MIXER_KERNELS[block.letter] for block in parse_stack(settings.stack)[0]}
    if settings.titans_depth == 2 and "titans" in mixers:
        mixers = mixers - {"titans"} | {"deep"}
    parts = {"experts": has_experts(settings), "written": bool(settings.inplace_layers),
             "recalled": bool(settings.retrieval_bits)}
    return ["attention", "mean_nats", "mlp", *sorted(mixers - {"attention"}),
            *(name for name, on in parts.items() if on)]


class Picked(NamedTuple):
    """The chosen function of each operation, those that only some models need by name, and whether rows are packed."""
    attention: Callable[..., Tensor]
    mean_nats: Callable[..., Tensor]
    mlp: Callable[..., Tensor]
    others: dict[str, Callable[..., Any]]
    packed: bool = False
    unrolled: bool = False  # a compiled graph would hold a recurrence's chunks one by one: one graph for each length


def pick_kernels(choice: str, device: torch.device, dtype: torch.dtype = torch.float32,
                 settings: ModelSettings | None = None) -> tuple[Picked, list[str]]:
    """The functions to use on a device, and one printable line an operation saying which, and why not another one.
    Attention takes packed rows only where what else mixes positions does."""
    settings = settings or ModelSettings()
    names, picked, lines, rows_only, unrolled = kernels_of(settings), {}, [], "", False
    for name in sorted(names, key=lambda name: name == "attention"):
        kernel, taken = KERNELS[name], "reference"
        reasons = ["KERNELS=reference"] if choice == "reference" else []
        for twin_name, twin in () if choice == "reference" else kernel.twins.items():
            if not (reason := twin.unusable(device, dtype, settings)) and not (twin.packed and name == "attention"
                                                                               and rows_only):
                taken = twin_name
                break
            reasons.append(f"{twin_name}: {reason or f'{rows_only} does not take packed rows'}")
        picked[name] = kernel.reference if taken == "reference" else kernel.twins[taken].make()
        packed = taken != "reference" and kernel.twins[taken].packed
        if name not in Picked._fields and kernel.mixes and not packed:
            unrolled = unrolled or kernel.walks
            rows_only = f"{taken} {name}"
        lines.append(f"kernel:{name} {taken}" + (f" ({'; '.join(reasons)})" if reasons else ""))
    others = {name: picked.pop(name) for name in names if name not in Picked._fields}
    return Picked(**picked, others=others, packed=packed, unrolled=unrolled), sorted(
        lines, key=lambda line: names.index(line.split()[0].removeprefix("kernel:")))


def pick_dtype(choice: str, device: torch.device) -> torch.dtype:
    """The dtype of activations and products: bfloat16 where the unit multiplies it natively, float16 on GPUs that have
    only that (compute capability 7.0 and 7.5), else float32."""
    if choice != "auto":
        return getattr(torch, choice)
    if device.type == "cuda":
        half = torch.float16 if torch.cuda.get_device_capability(device) >= (7, 0) else torch.float32
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else half
    native = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return torch.bfloat16 if any(getattr(torch.cpu, probe, bool)() for probe in native) else torch.float32


# ==== 07 FORMATS ============================================================================================
# Float tensor <-> integer codes and coded scales: one formula a format, used in training, export, load and
# statistics alike. Decoding needs only what encode returned, in integers and IEEE products, so what is scored
# is exactly what is stored, on any machine. The policy says which tensor gets which format; the solvers choose
# the codes. To add a format: add a row to FORMATS; the tests try every row on ragged, constant and zero input.

SCALE_LEVELS, SCALE_RATIO, SCALE_SPAN = 128, 1.02, 2.0 ** 20
SIGMAS_FLOOR = 4.0


class Route(NamedTuple):
    """How one tensor is stored: its format and that format's parameters, the solver of its codes, its codec."""
    format: str
    group: int = 0  # inputs that share a scale; 0 is the whole row
    sigmas: float = 0.0  # grid ends at this many deviations of the row or group; 0 uses the quantile
    quantile: float = 1.0  # of the row's magnitudes; groups end at their largest one
    scale: str = "absmean"
    tau: float = 0.5
    solver: str = "nearest"
    codec: str = "auto"
    stretch: float = 1.0  # factor on every step
    steps: Tensor | None = None  # (R,): the rows' steps, instead of what sigmas and quantile say
    fine: tuple[int, int, int] = (0, 0, 0)  # columns [start, stop) get a grid of this many bits


class Coded(NamedTuple):
    """A tensor in a format: everything decode needs beside its route and shape.

    `codes` are int8 (R, C), or int16 bit patterns of a half; `sides` are int8 matrices that go through the coder as
    codes do: `levels` (R, 1), `groups` (R, G), `zeros` (R, G). Scale level n stands for unit * ratio^n.
    """
    codes: Tensor
    sides: dict[str, Tensor]
    unit: float
    ratio: float


class Grid(NamedTuple):
    """The points a solver may choose, column by column: value = (code - zero) * step, code in low..high. With `cut`,
    codes are signs of what is larger than it. step, zero, cut: (R, 1) or (R, C); low, high: (1,) or (C,)."""
    step: Tensor
    zero: Tensor
    low: Tensor
    high: Tensor
    cut: Tensor | None

    def columns(self, index: Tensor | slice) -> "Grid":
        """The grid of some columns."""
        return Grid(*(part if part is None or part.shape[-1] == 1 else part[..., index] for part in self))

    def snap(self, values: Tensor) -> Tensor:
        """Nearest code of every value, in the values' dtype."""
        if self.cut is not None:
            return torch.where(values < 0, -1.0, 1.0).to(values.dtype) * (values.abs() > self.cut)
        return (values / self.step + self.zero).round().clamp(self.low.to(values.dtype), self.high.to(values.dtype))

    def value(self, codes: Tensor) -> Tensor:
        """What codes stand for, in their dtype."""
        return (codes - self.zero) * self.step


def as_rows(weight: Tensor) -> Tensor:
    """A tensor as a matrix (R, C): vectors are one row, further dimensions are columns."""
    return weight.reshape(1, -1) if weight.ndim < 2 else weight.flatten(1)


def group_count(columns: int, group: int) -> int:
    """Scales of one row."""
    return -(-columns // group) if group else 1


def _grouped(weight: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """(R, G, g) with zeros behind a ragged last group, and how many of each group are real, (G,)."""
    rows, columns = weight.shape
    size, count = group or columns, group_count(columns, group)
    padded = F.pad(weight, (0, count * size - columns)).view(rows, count, size)
    real = torch.full((count,), float(size), dtype=weight.dtype, device=weight.device)
    real[-1] = columns - (count - 1) * size
    return padded, real


def _deviation(groups: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (R, G) of the real members of each group."""
    mean = groups.sum(2) / real
    inside = torch.arange(groups.shape[2], device=groups.device) < real[:, None]  # (G, g)
    return mean, (((groups - mean[..., None]) * inside).square().sum(2) / real).sqrt()


def encode_levels(wanted: Tensor, up: bool) -> tuple[dict[str, Tensor], float, float]:
    """Scales (R, G) as whole powers of a ratio: the row's level, each group's difference to it, unit and ratio.

    A step of 2 % costs nothing where the scale is a rate knob anyway, and a level costs half the bits of an fp16
    number. `up` rounds to the next larger scale, so that nothing is clipped that was to be kept. The ratio widens where
    the scales span more than the levels do; what is 2^20 times smaller than the largest is lifted to that.
    """
    wanted = wanted.double().clamp_min(max(float(wanted.max()), 1e-30) / SCALE_SPAN)
    unit = float(np.float32(float(wanted.min())))
    span = float(wanted.max()) / unit
    ratio = float(np.float32(max(SCALE_RATIO, span ** (1 / (SCALE_LEVELS - 2)))))
    power = (wanted / unit).log() / math.log(ratio)
    level = ((power - 1e-4).ceil() if up else power.round()).clamp(0, SCALE_LEVELS - 1)
    row = level.median(dim=1, keepdim=True).values
    sides = {"levels": row.to(torch.int8)}
    if wanted.shape[1] > 1:
        sides["groups"] = (level - row).to(torch.int8)
    return sides, unit, ratio


def decode_levels(sides: Mapping[str, Tensor], unit: float, ratio: float) -> Tensor:
    """The fp32 scales (R, G): products in a fixed order, so the same bits on every machine."""
    powers = [unit]
    while len(powers) < SCALE_LEVELS:
        powers.append(powers[-1] * ratio)
    index = sides["levels"].long() + (sides["groups"].long() if "groups" in sides else 0)
    table = torch.tensor(powers, dtype=torch.float64, device=index.device).float()
    return table[index.clamp(0, SCALE_LEVELS - 1)]


def _row_quantile(weight: Tensor, quantile: float) -> Tensor:
    """Quantile of each row's magnitudes, (R, 1); in parts, because torch limits one call's elements."""
    parts = weight.abs().split(max(1, (1 << 23) // max(1, weight.shape[1])))
    return torch.cat([part.quantile(quantile, dim=1) for part in parts])[:, None]


class Measured(NamedTuple):
    """What a grid format reads off a tensor: the coded scales, and a threshold that only encoding needs."""
    sides: dict[str, Tensor]
    unit: float
    ratio: float
    cut: Tensor | None


def finest_stretch(route: Route) -> float:
    """The smallest factor on a grid's step that does not clip more than SIGMAS_FLOOR deviations do."""
    return min(1.0, SIGMAS_FLOOR / route.sigmas) if route.sigmas else 1.0


def _chosen_steps(steps: Tensor, route: Route) -> Tensor:
    """The policy's steps (R, G) times the stretch, or the steps that were chosen for the rows, above the finest."""
    if route.steps is None:
        return steps * route.stretch
    return torch.maximum(steps * finest_stretch(route), (route.steps * route.stretch)[:, None].to(steps))


def measure_symmetric(weight: Tensor, route: Route, bits: int) -> Measured:
    """Grid of 2^bits - 1 points around zero that ends at k deviations, or at a quantile. Source: SDClip, PR 1394."""
    groups, real = _grouped(weight.double(), route.group)
    if route.sigmas:
        end = route.sigmas * _deviation(groups, real)[1]
    else:
        end = _row_quantile(weight.double(), route.quantile) if groups.shape[1] == 1 else groups.abs().amax(2)
    largest = groups.abs().amax(2)
    end = torch.where(end > 1e-6 * largest, end, largest)  # a row of one value, or of zeros but for a few
    return Measured(*encode_levels(_chosen_steps(end / (2 ** (bits - 1) - 1), route), up=True), None)


def measure_asymmetric(weight: Tensor, route: Route, bits: int) -> Measured:
    """Grid of 2^bits points from the smallest value to the largest, zero among them; with k, at most k deviations from
    the mean. The codes are shifted by half their range into int8."""
    groups, real = _grouped(weight.double(), route.group)
    low, high = groups.amin(2), groups.amax(2)
    if route.sigmas:
        mean, deviation = _deviation(groups, real)
        low = torch.maximum(low, mean - route.sigmas * deviation)
        high = torch.minimum(high, mean + route.sigmas * deviation)
    low, high = low.clamp_max(0), high.clamp_min(0)
    sides, unit, ratio = encode_levels(_chosen_steps((high - low) / (2 ** bits - 1), route), up=True)
    zero = (-low / decode_levels(sides, unit, ratio).double()).round().clamp(0, 2 ** bits - 1)
    return Measured({**sides, "zeros": (zero - 2 ** (bits - 1)).to(torch.int8)}, unit, ratio, None)


def ternary_base(weight: Tensor, route: Route) -> tuple[Tensor, Tensor]:
    """A weight (R, C) in groups (R, G, g), fp64, and each group's mean magnitude or root mean square (R, G)."""
    groups, real = _grouped(weight.double(), route.group)
    return groups, (groups.square().sum(2) / real).sqrt() if route.scale == "rms" else groups.abs().sum(2) / real


def measure_ternary(weight: Tensor, route: Route, bits: int) -> Measured:
    """-1, 0, 1 times a scale: what is larger than tau times the group's mean magnitude (or root mean square) survives.
    The scale is that mean, or with `nonzero` the mean of the survivors, which is L2-optimal for the pattern.
    Sources: BitNet b1.58 (absmean), the challenge's ternary record (rms), ternary weight networks (nonzero)."""
    groups, base = ternary_base(weight, route)
    size, cut = groups.abs(), route.tau * base
    kept = size > cut[..., None]
    alpha = (size * kept).sum(2) / kept.sum(2).clamp_min(1) if route.scale == "nonzero" else base
    return Measured(*encode_levels(alpha, up=False), cut)


def measure_binary(weight: Tensor, route: Route, bits: int) -> Measured:
    """-1 or 1 times the group's mean magnitude; zero counts as positive."""
    groups, real = _grouped(weight.double(), route.group)
    alpha = groups.abs().sum(2) / real
    return Measured(*encode_levels(alpha, up=False), torch.full_like(alpha, -1.0))


def make_grid(measured: Measured, route: Route, columns: int, low: int, high: int) -> Grid:
    """The points of a grid format from what is stored."""
    def spread(part: Tensor) -> Tensor:
        return part.repeat_interleave(route.group, 1)[:, :columns] if part.shape[1] > 1 else part

    step = spread(decode_levels(measured.sides, measured.unit, measured.ratio))
    zero = spread(measured.sides["zeros"]).float() if "zeros" in measured.sides else step.new_zeros(1, 1)
    lows, highs = step.new_tensor([low]), step.new_tensor([high])
    start, stop, bits = route.fine
    if bits:
        top = 2 ** (bits - 1) - 1
        index = torch.arange(columns, device=step.device)
        inside = (index >= start) & (index < stop)
        step = torch.where(inside, step * (high / top), step)
        lows, highs = torch.where(inside, -top, lows), torch.where(inside, top, highs)
    return Grid(step, zero, lows, highs, None if measured.cut is None else spread(measured.cut))


def encode_grid(weight: Tensor, route: Route) -> Coded:
    """Nearest code of every weight of a grid format."""
    form, weight = FORMATS[route.format], as_rows(weight)
    measured = form.measure(weight, route, form.bits)
    grid = make_grid(measured, route, weight.shape[1], form.low, form.high)
    return Coded(grid.snap(weight.double()).to(torch.int8), measured.sides, measured.unit, measured.ratio)


def decode_grid(coded: Coded, route: Route, shape: tuple[int, ...]) -> Tensor:
    """The fp32 weights of a grid format: one product a weight."""
    form = FORMATS[route.format]
    grid = make_grid(Measured(coded.sides, coded.unit, coded.ratio, None), route, coded.codes.shape[1], form.low,
                     form.high)
    return grid.value(coded.codes.float()).reshape(shape)


def encode_sherry(weight: Tensor, route: Route) -> Coded:
    """3:4 sparse signs: of four inputs the smallest becomes zero, the others their sign times the mean magnitude of the
    group's survivors. A code holds four weights: place of the zero times 8 plus the three signs. Source: Sherry,
    arXiv 2601.07892."""
    wide = as_rows(weight).double()
    wide = F.pad(wide, (0, -wide.shape[1] % 4))
    rows, columns = wide.shape
    blocks = wide.view(rows, columns // 4, 4)
    place = blocks.abs().argmin(2, keepdim=True)
    kept = torch.ones_like(blocks).scatter_(2, place, 0.0)
    count = (kept.view(rows, columns) * (torch.arange(columns, device=wide.device) < as_rows(weight).shape[1]))
    total, _ = _grouped((blocks.abs() * kept).view(rows, columns), route.group)
    survivors = _grouped(count, route.group)[0].sum(2)
    sides, unit, ratio = encode_levels(total.sum(2) / survivors.clamp_min(1), up=False)
    others = torch.arange(3, device=wide.device) + (torch.arange(3, device=wide.device) >= place)
    signs = (blocks.gather(2, others) < 0).long() @ torch.tensor([4, 2, 1], device=wide.device)
    return Coded((place[..., 0] * 8 + signs).to(torch.int8), sides, unit, ratio)


def decode_sherry(coded: Coded, route: Route, shape: tuple[int, ...]) -> Tensor:
    """fp32 weights of sherry codes."""
    codes = coded.codes.long().clamp(0, 31)
    rows, blocks = codes.shape
    columns = math.prod(shape) // rows
    bits = torch.tensor([4, 2, 1], device=codes.device)
    signs = 1.0 - 2.0 * ((codes[..., None] % 8) & bits > 0).float()
    place = (codes // 8)[..., None]
    others = torch.arange(3, device=codes.device) + (torch.arange(3, device=codes.device) >= place)
    pattern = torch.zeros(rows, blocks, 4, device=codes.device).scatter_(2, others, signs).view(rows, -1)
    step = decode_levels(coded.sides, coded.unit, coded.ratio)
    step = step.repeat_interleave(route.group, 1)[:, :4 * blocks] if step.shape[1] > 1 else step
    return (pattern * step)[:, :columns].reshape(shape)


def encode_half(weight: Tensor, route: Route, dtype: torch.dtype) -> Coded:
    """A 16-bit float, any shape; values beyond its range are an error, never infinities."""
    half = as_rows(weight).to(dtype)
    if not torch.isfinite(half).all():
        raise CheckError(f"a weight of {weight.abs().max():g} does not fit {route.format}, whose largest value is "
                         f"{torch.finfo(dtype).max:g}")
    return Coded(half.view(torch.int16), {}, 1.0, 1.0)


def decode_half(coded: Coded, route: Route, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """fp32 of the 16-bit patterns."""
    return coded.codes.contiguous().view(dtype).float().reshape(shape)


def encode_fp8(weight: Tensor, route: Route) -> Coded:
    """e4m3 of the weights over a power of two that brings the largest one just below the format's end."""
    wide, end = as_rows(weight).float(), torch.finfo(torch.float8_e4m3fn).max
    largest = float(wide.abs().max())
    unit = 2.0 ** math.ceil(math.log2(largest / end)) if largest > 1e-30 else 1.0
    return Coded((wide / unit).to(torch.float8_e4m3fn).view(torch.int8), {}, unit, 1.0)


def decode_fp8(coded: Coded, route: Route, shape: tuple[int, ...]) -> Tensor:
    """fp32 of the e4m3 patterns."""
    return (coded.codes.contiguous().view(torch.float8_e4m3fn).float() * coded.unit).reshape(shape)


class Format(NamedTuple):
    """A numeric format: encode(weight, route) -> Coded, decode(coded, route, shape) -> fp32, bits of one weight before
    entropy coding, the codes' range, and for formats with a grid what measures its scales."""
    encode: Callable[[Tensor, Route], Coded]
    decode: Callable[[Coded, Route, tuple[int, ...]], Tensor]
    bits: float
    low: int
    high: int
    measure: Callable[[Tensor, Route, int], Measured] | None = None
    coded_bits: float = 0.0  # entropy of a Gaussian weight where it is below `bits` whatever the weight's size


FORMATS: dict[str, Format] = {
    **{f"int{bits}": Format(encode_grid, decode_grid, bits, 1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1,
                            measure_symmetric) for bits in range(2, 9)},
    **{f"uint{bits}": Format(encode_grid, decode_grid, bits, -2 ** (bits - 1), 2 ** (bits - 1) - 1,
                             measure_asymmetric) for bits in range(2, 9)},
    "ternary": Format(encode_grid, decode_grid, math.log2(3), -1, 1, measure_ternary),
    "binary": Format(encode_grid, decode_grid, 1, -1, 1, measure_binary),
    "sherry": Format(encode_sherry, decode_sherry, 1.25, 0, 31),
    "fp8": Format(encode_fp8, decode_fp8, 8, -128, 127, coded_bits=6.47),
    "fp16": Format(functools.partial(encode_half, dtype=torch.float16),
                   functools.partial(decode_half, dtype=torch.float16), 16, -32768, 32767),
    "bf16": Format(functools.partial(encode_half, dtype=torch.bfloat16),
                   functools.partial(decode_half, dtype=torch.bfloat16), 16, -32768, 32767),
}


def project(weight: Tensor, route: Route) -> Tensor:
    """The weight as it comes back from the artifact. Training takes its loss at this point and hands the gradient
    straight to the weight (straight-through)."""
    form = FORMATS[route.format]
    return form.decode(form.encode(weight.detach(), route), route, tuple(weight.shape))
def standard_policy(settings: ArtifactSettings) -> tuple[tuple[str, dict[str, Any]], ...]:
    """The rows that the single settings stand for, below the user's own: parts of a block, then roles, then the
    rest."""
    def row(kind: str, bits: int, sigmas: float) -> dict[str, Any]:
        name = f"{kind}{bits}" if kind in ("int", "uint") else kind
        return {"format": name, "sigmas": sigmas, "group": settings.group_size, "quantile": settings.clip_quantile,
                "solver": settings.solver}

    shared = {"scale": settings.ternary_scale, "tau": settings.ternary_tau}
    parts = [("*.mixer.*", settings.attn_clip_sigmas), ("*.mlp.*", settings.mlp_clip_sigmas)]
    return (*((pattern, {"sigmas": sigmas}) for pattern, sigmas in parts if sigmas),
            ("matrix", row(settings.matrix_format, settings.matrix_bits, settings.matrix_clip_sigmas)),
            ("embedding", row(settings.embed_format, settings.embed_bits, settings.embed_clip_sigmas)),
            ("table", {**row(settings.embed_format, settings.embed_bits, settings.embed_clip_sigmas),
                       "solver": "nearest"}),
            ("factor", {"format": "fp8"}),
            ("*", {"format": settings.gain_format, **shared}))


def pick_route(name: str, role: str, settings: ArtifactSettings) -> Route:
    """How a parameter is stored: the first row of the policy that matches its name or role wins, field by field.

    Raises ConfigError where the user's row asks a solver of a format without a grid.
    """
    fields: dict[str, Any] = {}
    for pattern, values in parse_policy(settings.policy):
        if pattern == role or fnmatch.fnmatchcase(name, pattern):
            fields = {**values, **fields}
    asked = fields.get("solver", "nearest")
    for pattern, values in standard_policy(settings):
        if pattern == role or fnmatch.fnmatchcase(name, pattern):
            fields = {**values, **fields}
    if not FORMATS[fields["format"]].measure:
        if asked != "nearest":
            raise ConfigError(f"POLICY={settings.policy}: {name}: {fields['format']} has no grid for solver={asked}")
        fields["solver"] = "nearest"
    return Route(**fields)


def can_stretch(route: Route) -> bool:
    """Whether the step of a format is free to be chosen."""
    return route.format.startswith(("int", "uint"))


def solve_nearest(weight: Tensor, grid: Grid, hessian: Tensor | None, settings: ArtifactSettings) -> Tensor:
    """The nearest code of every weight (R, C), in fp64."""
    return grid.snap(weight)


def upper_factor(hessian: Tensor, damping: float) -> Tensor:
    """Upper U with U^T U = (H + damping * mean(diag H) * I)^-1. From one Cholesky factor of H with rows and columns
    reversed, whose inverse is triangular too; the inverse of H itself is never formed."""
    damped = hessian + damping * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=hessian.dtype,
                                                                       device=hessian.device)
    lower, fault = torch.linalg.cholesky_ex(damped.flip(0, 1))
    if fault:
        raise CheckError(f"GPTQ_DAMPING={damping:g}: too small to make the moments of the inputs invertible; raise it "
                         "or GPTQ_CALIBRATION_BATCHES")
    reverse = lower.flip(0, 1)  # upper R with H = R R^T
    identity = torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
    return torch.linalg.solve_triangular(reverse, identity, upper=True)


def solve_gptq(weight: Tensor, grid: Grid, hessian: Tensor, settings: ArtifactSettings) -> Tensor:
    """Codes (R, C) column by column, the error of each pushed onto the columns still to come. weight (R, C) fp64,
    hessian (C, C) = sum of x x^T. Columns in the order of falling diagonal; a column without input gets code of 0, a
    matrix without any (an expert that no token chose) its nearest codes.
    Source: GPTQ, arXiv 2210.17323.

    With RATE_ROUNDING a code moves one towards zero where the bits it saves, by a Gaussian of the row around zero, are
    worth the added error: at rate 1 by the grid's own exchange, a step^2 / 12 halved twice by each further bit.
    """
    hessian = hessian.to(weight.dtype).clone()
    dead = hessian.diagonal() <= 0
    if dead.all():
        return grid.snap(weight)
    hessian[dead, dead] = hessian.diagonal()[~dead].mean()
    rest = torch.where(dead, 0.0, weight)
    order = hessian.diagonal().argsort(descending=True, stable=True)
    upper = upper_factor(hessian[order][:, order], settings.gptq_damping)
    price = settings.rate_rounding / 12 if grid.cut is None else 0.0  # of signs, more zeros are not fewer bits
    spread = (weight / grid.step).square().mean(1, keepdim=True).clamp_min(0.1)  # (R, 1), in steps^2
    rest, grid = rest[:, order].T.contiguous(), grid.columns(order)  # (C, R): a column lies together
    codes = torch.empty_like(rest)
    for start in range(0, len(rest), settings.gptq_block):
        stop = min(start + settings.gptq_block, len(rest))
        block, part, errors = rest[start:stop].clone(), upper[start:stop], rest.new_empty(stop - start, rest.shape[1])
        for index in range(stop - start):
            column = grid.columns(slice(start + index, start + index + 1))
            value = block[index][:, None]
            code = column.snap(value)
            if price:
                away, at = code - column.zero, value / column.step
                lower = away - away.sign()
                worth = price * (away.square() - lower.square()) / spread
                code = torch.where((at - lower).square() - (at - away).square() < worth, lower + column.zero, code)
            errors[index] = ((value - column.value(code)) / part[index, start + index])[:, 0]
            codes[start + index] = code[:, 0]
            block[index + 1:] -= part[index, start + index + 1:stop, None] * errors[index]
        rest[stop:] -= part[:, stop:].T @ errors
    result = torch.empty_like(codes)
    result[order] = codes
    return result.T


SOLVERS: dict[str, Callable[..., Tensor]] = {"nearest": solve_nearest, "gptq": solve_gptq}


def prune_ones(weight: Tensor, codes: Tensor, grid: Grid, hessian: Tensor, share: float) -> Tensor:
    """The codes with `share` of all 1 and -1 set to 0: those whose single change raises tr(E H E^T) least, E being the
    error. Changing code q adds 2 s q (E H) + s^2 H_jj, so one product prices them all."""
    ones = codes.abs() == 1
    count = int(share * int(ones.sum()))
    if not count:
        return codes
    hessian = hessian.to(weight.dtype)
    error = weight - grid.value(codes)
    change = codes * grid.step
    cost = torch.where(ones, 2 * change * (error @ hessian) + change.square() * hessian.diagonal(), math.inf)
    codes = codes.clone(memory_format=torch.contiguous_format)
    codes.view(-1)[cost.flatten().argsort(stable=True)[:count]] = 0
    return codes


def solve(weight: Tensor, route: Route, hessian: Tensor | None, settings: ArtifactSettings) -> Coded:
    """The tensor in its format, by its solver; ConfigError where a solver lacks the Hessian it needs."""
    form = FORMATS[route.format]
    if form.measure is None or (route.solver == "nearest" and (hessian is None or not settings.prune_ones)):
        return form.encode(weight, route)
    if hessian is None:
        raise ConfigError(f"SOLVER={route.solver}: no input of this tensor was seen; STAGES needs calibrate")
    wide = as_rows(weight).double()
    measured = form.measure(wide, route, form.bits)
    grid = make_grid(measured, route, wide.shape[1], form.low, form.high)
    codes = SOLVERS[route.solver](wide, grid, hessian, settings)
    if settings.prune_ones and "zeros" not in measured.sides:
        codes = prune_ones(wide, codes, grid, hessian.to(wide.device), settings.prune_ones)
    return Coded(codes.to(torch.int8), measured.sides, measured.unit, measured.ratio)


# ==== 08 LAYERS =============================================================================================
# The parts of a block. Every projection is a named site: what `deltas` supplies for it is added here and
# nowhere else. A part is strictly causal and sees documents only through the mask it is given. Parameters get
# their role where they are made.


class Delta(NamedTuple):
    """A low-rank addition at a site: x (B, T, in) -> (x a^T) b^T, with a (B or 1, R, in) and b (B or 1, out, R)."""
    a: Tensor
    b: Tensor


# What a site adds: a low-rank product, or a function (output, input) -> output, which may also only watch.
Deltas = Mapping[str, Delta | Callable[[Tensor, Tensor], Tensor]]


def make_parameter(shape: tuple[int, ...], role: str, start: float | str = 0.0) -> nn.Parameter:
    """An fp32 parameter stamped with its role and with its start: a constant, or a name that init_weights knows."""
    parameter = nn.Parameter(torch.empty(shape, dtype=torch.float32))
    parameter.role, parameter.start = role, start
    return parameter


def add_delta(y: Tensor, x: Tensor, site: str, deltas: Deltas | None) -> Tensor:
    """y plus what deltas hold for the site, computed from x; y itself when they hold nothing."""
    if deltas is None or site not in deltas:
        return y
    delta = deltas[site]
    if callable(delta):
        return delta(y, x)
    a, b = delta
    return y + (x @ a.to(x.dtype).mT) @ b.to(x.dtype).mT


class LowRank(nn.Module):
    """A low-rank path x A^T B^T times tanh of a learned gate that starts at 0. Source: HGF, arXiv 2602.05269, whose
    gate reads the data."""

    def __init__(self, inputs: int, outputs: int, rank: int) -> None:
        super().__init__()
        self.a = make_parameter((rank, inputs), "factor", "uniform")
        self.b = make_parameter((outputs, rank), "factor", "uniform")
        self.gate = make_parameter((1,), "gate", 0.0)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return F.linear(F.linear(x, self.a.to(x.dtype)), self.b.to(x.dtype)) * self.gate.tanh().to(x.dtype)


def round_tokens(x: Tensor) -> Tensor:
    """x (..., C) on a grid of 255 steps from minus to plus its largest magnitude, for each token; the gradient goes
    straight through. Source: BitNet b1.58."""
    step = x.detach().abs().amax(-1, keepdim=True).clamp_min(1e-5) / 127
    return x + ((x.detach() / step).round() * step - x.detach())


class Linear(nn.Module):
    """A matrix (out, in) with an fp32 master, cast to the input's dtype where it is used; what `fit_out` adds to those
    of a block: a low-rank path beside it, and inputs of 8 bits."""

    def __init__(self, inputs: int, outputs: int, start: float | str) -> None:
        super().__init__()
        self.weight, self.path, self.rounds = make_parameter((outputs, inputs), "matrix", start), None, False

    def forward(self, x: Tensor, site: str, deltas: Deltas | None) -> Tensor:
        """(..., in) -> (..., out)."""
        x = round_tokens(x) if self.rounds else x
        y = F.linear(x, self.weight.to(x.dtype))
        return add_delta(y if self.path is None else y + self.path(x), x, site, deltas)


def fit_out(part: nn.Module, settings: ModelSettings) -> None:
    """Give the matrices of a block what HGF_RANK and ACT_INT8 ask for."""
    for module in list(part.modules()):
        if isinstance(module, Linear):
            module.rounds = settings.act_int8
            module.path = LowRank(*reversed(module.weight.shape), settings.hgf_rank) if settings.hgf_rank else None


def rms_norm(x: Tensor, eps: float) -> Tensor:
    """x over the root of its mean square plus eps, along the last dimension; no weight."""
    return F.rms_norm(x, (x.shape[-1],), None, eps)


def rotary_tables(length: int, dims: int, settings: ModelSettings, like: Tensor, stretch: float = 1.0, first: int = 0
                  ) -> tuple[Tensor, Tensor]:
    """cos and sin (T, 1, dims / 2) in like's dtype, from fp32, of positions from `first` on: position times base^(-2j /
    dims) / stretch; the slowest three quarters are slowed by up to YARN_FACTOR. Sources: RoFormer; YaRN as in the
    challenge's ternary record."""
    place = torch.arange(0, dims, 2, device=like.device, dtype=torch.float32) / max(1, dims)
    inverse = settings.rope_base ** -place / stretch
    if settings.yarn_factor != 1:
        inverse = inverse / (1 + ((place - 0.25) / 0.75).clamp(0, 1) * (settings.yarn_factor - 1))
    angles = torch.arange(first, first + length, device=like.device, dtype=torch.float32)[:, None, None] * inverse
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B, T, H, C) with its first channels turned by position; pairs are (j, j + dims / 2). The rest passes."""
    half = cos.shape[-1]
    first, second, rest = x[..., :half], x[..., half:2 * half], x[..., 2 * half:]
    return torch.cat((first * cos + second * sin, second * cos - first * sin, rest), dim=-1)


class Sites(NamedTuple):
    """The site names of one visit. `attn` and `mlp` are paths beside the whole part, from its input to its output;
    `gate` is a recurrent mixer's output gate, `gates` are the raw ones that rule its state, `code`, `field` and `knot`
    the matrices of a span knot, `route` the scores by which experts are chosen."""
    q: str
    k: str
    v: str
    gates: str
    gate: str
    o: str
    code: str
    field: str
    knot: str
    attn: str
    up: str
    down: str
    route: str
    mlp: str


NEAR_TOKENS = 8  # behind a token, that the parts beside the blocks look at, together


class Memory:
    """What later tokens need of the one document (in every row) that a model has read in pieces: how many tokens that
    are, the last of them, and by visit and part keys and values, states, and ends of convolutions. Tensors in it are
    replaced, never changed, so a copy shares them."""

    def __init__(self) -> None:
        self.length, self.tail, self.held = 0, None, {}

    def copy(self) -> "Memory":
        """The same, to go on from twice."""
        other = Memory()
        other.length, other.tail, other.held = self.length, self.tail, dict(self.held)
        return other

    def bytes(self) -> int:
        """Bytes of all that is held."""
        def size(part: Any) -> int:
            return part.numel() * part.element_size() if isinstance(part, Tensor) else sum(map(size, part)) if (
                isinstance(part, tuple)) else 0
        return sum(map(size, self.held.values())) + size(self.tail)

    def extend(self, key: tuple[int, str], x: Tensor, most: int = 0) -> Tensor:
        """x (B, T, ...) behind what is held of earlier tokens; at least the last `most` of both are held, 0 is all."""
        whole = torch.cat([self.held[key], x], 1) if key in self.held else x
        self.held[key] = whole[:, -most:] if most else whole
        return whole


class Context(NamedTuple):
    """What the visits of one forward share: who may see whom (a mask (B, 1, T, T), spans, or None for plain causal);
    the same as documents (B, T) or None; value embeddings (B, T, K, C) or None; the first visit's values (B, T, K, C),
    None until there are some; what this visit's rotary frequencies are divided by; its number; what was read before,
    None where nothing was; and which rows take part in the visit, 0 or 1, one number or (B, 1, 1), None is all."""
    mask: "Tensor | Spans | None"
    docs: Tensor | None
    embedded: Tensor | None
    first: Tensor | None
    stretch: float = 1.0
    visit: int = 0
    memory: Memory | None = None
    live: Tensor | None = None

    def go_on(self, rule: Callable[..., tuple[Tensor, Any]], inputs: tuple[Any, ...], where: "Tensor | Spans | None",
              size: int) -> Tensor:
        """A recurrence on its inputs (B, T, ...), from the state that the memory holds, which is then the new one."""
        if self.memory is None:
            return rule(*inputs, where, None, size)[0]
        key = self.visit, "state"
        out, self.memory.held[key] = rule(*inputs, where, self.memory.held.get(key), min(size, inputs[0].shape[1]))
        return out


class HeadGate(NamedTuple):
    """A gate on the output of each head: whether it reads all channels or a window of them, how its matrix starts, and
    its factor (..., H) from logits and settings."""
    dense: bool
    start: float | str
    factor: Callable[[Tensor, ModelSettings], Tensor]


# Sources: PR 1787 (sparse), 1736 (dense), 1667 (output) of the challenge.
ATTN_GATES: dict[str, HeadGate] = {
    "sparse": HeadGate(False, 0.0, lambda z, settings: torch.sigmoid(settings.sparse_attn_gate_scale * z)),
    "dense": HeadGate(True, "faint", lambda z, settings: torch.sigmoid(z)),
    "output": HeadGate(False, 0.0, lambda z, settings: 2 * torch.sigmoid(z)),
}


class BlockPlan(NamedTuple):
    """One block with everything resolved: its place, its mixer's letter, heads, key/value heads, feed-forward width;
    the factor on its normalised inputs; the gate on its heads; whether it has exclusive attention, value embeddings,
    residual lanes; of a recurrent mixer the channels of a head's keys and values, the width of its convolutions and
    whether its output has a gate; how many experts its feed-forward has, 0 where it is whole, and whether that learns
    from the text in place."""
    index: int
    letter: str
    heads: int
    kv_heads: int
    hidden: int
    scale: float
    gate: HeadGate | None
    exclusive: bool
    embedded: bool
    lanes: bool
    key: int
    value: int
    conv: int
    gated: bool
    experts: int
    learns: bool


def plan_blocks(settings: ModelSettings) -> tuple[BlockPlan, ...]:
    """The blocks of a STACK, with the model's settings and their own overrides resolved."""
    blocks, _ = parse_stack(settings.stack)
    named, first_lane = parse_layers(settings.ve_layers), settings.parallel_start_layer or len(blocks)
    learning, plans = parse_layers(settings.inplace_layers, "INPLACE_LAYERS"), []
    for index, block in enumerate(blocks):
        own, attends = own_settings(settings, block), block.letter == "A"
        exclusive = block.overrides.get("xsa_last_n", index >= len(blocks) - settings.xsa_last_n)
        plans.append(BlockPlan(
            index, block.letter, own.num_heads, own.num_kv_heads if attends else own.num_heads,
            round(own.mlp_mult * settings.model_dim), (index + 1) ** -0.5 if settings.ln_scale else 1.0,
            ATTN_GATES.get(settings.attn_gate) if attends else None, attends and bool(exclusive), index in named,
            index >= first_lane, round(own.expand_k * settings.model_dim / own.num_heads),
            round(own.expand_v * settings.model_dim / own.num_heads), own.conv_size, own.mixer_gate, own.moe_experts,
            index in learning))
    return tuple(plans)


def expert_width(settings: ModelSettings, plan: BlockPlan) -> int:
    """The width of one expert of a block."""
    return split_width(settings, plan.hidden, plan.experts)


def active_width(settings: ModelSettings, plan: BlockPlan) -> int:
    """Hidden channels of a feed-forward that one token takes: of all experts where each goes by itself."""
    each = plan.experts if settings.hgf_rank or settings.act_int8 else settings.moe_topk
    return expert_width(settings, plan) * (each + settings.moe_shared) if plan.experts else plan.hidden


def learning_width(settings: ModelSettings, plan: BlockPlan) -> int:
    """Hidden channels of what learns in place: of the part that every token takes."""
    return expert_width(settings, plan) * settings.moe_shared if plan.experts else plan.hidden


def exclude_own(y: Tensor, v: Tensor) -> Tensor:
    """y (B, T, H, C) without its part along the value v (B, T, K, C) of its own position: exclusive self-attention
    (XSA), as in the record stacks of the challenge."""
    unit = F.normalize(v.to(torch.promote_types(v.dtype, torch.float32)), dim=-1).to(v.dtype)[..., None, :]
    grouped = y.unflatten(2, (v.shape[2], -1))  # (B, T, K, H / K, C)
    return (grouped - (grouped * unit).sum(-1, keepdim=True) * unit).flatten(2, 3)


class Attention(nn.Module):
    """Grouped-query attention with normalised queries and keys, a gain per head and partial rotary embedding; on
    request exclusive, gated by head, and with values that take an embedding of the token or the first block's share."""

    def __init__(self, settings: ModelSettings, plan: BlockPlan, kernels: "Picked") -> None:
        super().__init__()
        width, self.plan, self.settings, self.attend = settings.model_dim, plan, settings, kernels.attention
        channels = width // plan.heads
        self.dims = max(0, settings.rope_dims or channels)
        self.q = Linear(width, plan.heads * channels, settings.matrix_init)
        self.k = Linear(width, plan.kv_heads * channels, settings.matrix_init)
        self.v = Linear(width, plan.kv_heads * channels, settings.matrix_init)
        self.o = Linear(plan.heads * channels, width, 0.0)
        self.q_gain = make_parameter((plan.heads,), "gain", settings.qk_gain_init)
        if plan.gate is not None:
            self.attn_gate = make_parameter((plan.heads, width if plan.gate.dense else settings.gate_window), "gate",
                                            plan.gate.start)
        # The first block's values are the others' to share; its own share of them would only scale it.
        self.residual = make_parameter((1,), "gate", 0.0) if settings.value_residual and plan.index else None
        self.ve_scale = make_parameter((1,), "gain", 0.1) if plan.embedded else None

    def forward(self, n: Tensor, context: Context, sites: Sites, deltas: Deltas | None) -> tuple[Tensor, Tensor]:
        """n (B, T, D), normalised -> what it adds (B, T, D), and its values (B, T, K, C)."""
        settings, eps = self.settings, self.settings.norm_eps
        q = self.q(n, sites.q, deltas).unflatten(-1, (self.plan.heads, -1))  # (B, T, H, C)
        k = self.k(n, sites.k, deltas).unflatten(-1, (self.plan.kv_heads, -1))  # (B, T, K, C)
        v = self.v(n, sites.v, deltas).unflatten(-1, (self.plan.kv_heads, -1))  # (B, T, K, C)
        if self.ve_scale is not None:
            v = v + self.ve_scale.to(n.dtype) * context.embedded
        if self.residual is not None and context.first is not None:
            v = v + self.residual.sigmoid().to(n.dtype) * context.first
        memory, length = context.memory, n.shape[1]
        cos, sin = rotary_tables(length, self.dims, settings, n, context.stretch, memory.length if memory else 0)
        q = rotate(rms_norm(q, eps), cos, sin) * self.q_gain.to(n.dtype)[:, None]
        k = rotate(rms_norm(k, eps), cos, sin)
        if memory is None:
            y = self.attend(q, k, v, context.mask)  # (B, T, H, C)
        else:
            keys, values = memory.extend((context.visit, "keys"), k), memory.extend((context.visit, "values"), v)
            seen = torch.ones(length, keys.shape[1], dtype=torch.bool, device=n.device).tril(keys.shape[1] - length)
            y = self.attend(q, keys, values, seen[None, None])
        if self.plan.exclusive:
            y = exclude_own(y, v)
        if (gate := self.plan.gate) is not None:
            read = n if gate.dense else n[..., :settings.gate_window]
            y = y * gate.factor(F.linear(read, self.attn_gate.to(n.dtype)), settings)[..., None]
        y = rms_norm(y.flatten(2), eps) if settings.extra_norms else y.flatten(2)
        return add_delta(self.o(y, sites.o, deltas), n, sites.attn, deltas), v


ACTIVATIONS: dict[str, Callable[[Tensor, ModelSettings], Tensor]] = {
    "relu_sq": lambda x, settings: F.leaky_relu(x, settings.mlp_slope).square(), "gelu": lambda x, settings: F.gelu(x)}


class Taught(NamedTuple):
    """What a feed-forward with experts, or one that learns in place, is told: the embedding stream (B, T, D); documents
    (B, T) or None; the visit's number, what was read before, and which rows take part."""
    stream: Tensor
    docs: Tensor | None
    visit: int = 0
    memory: Memory | None = None
    live: Tensor | None = None


class Written(nn.Module):
    """What the tokens so far write into the second matrix of a feed-forward: hidden values as keys, and as values what
    a convolution finds in the embeddings around each, within its chunk. Written by whole chunks, read by later ones of
    the same document, never by the same; begins as nothing. Source: In-Place TTT, arXiv 2604.06169; here keys have unit
    length, for hidden values grow with the width and are all positive, and the square matrix on the values is a factor
    for each channel."""

    TAPS = 5

    def __init__(self, settings: ModelSettings, write: Callable[..., Tensor]) -> None:
        super().__init__()
        self.settings, self.write = settings, write
        self.taps = make_parameter((settings.model_dim, self.TAPS), "gate", 0.0)
        self.target = make_parameter((settings.model_dim,), "gain", "gaussian")

    def values(self, taught: Taught) -> Tensor:
        """(B, T, D): the convolution of the stream within chunks and documents, times the factors."""
        stream, size, half = taught.stream, self.settings.inplace_chunk, self.TAPS // 2
        place = torch.arange(stream.shape[1], device=stream.device) // size
        cell = place[None] if taught.docs is None else taught.docs * (place[-1] + 1) + place
        found = stream * self.taps[:, half].to(stream.dtype)
        for ahead in range(1, min(half + 1, stream.shape[1])):
            same = (cell[:, ahead:] == cell[:, :-ahead]).to(stream.dtype)[..., None]
            for way, pads in ((1, (0, 0, 0, ahead)), (-1, (0, 0, ahead, 0))):
                brought = (stream[:, ahead:] if way > 0 else stream[:, :-ahead]) * same
                found = found + F.pad(brought, pads) * self.taps[:, half + way * ahead].to(stream.dtype)
        return found * self.target.to(stream.dtype)

    def forward(self, hidden: Tensor, taught: Taught) -> Tensor:
        """What hidden values (B, T, F) read, (B, T, D)."""
        settings, wide = self.settings, torch.promote_types(hidden.dtype, torch.float32)
        keys = F.normalize(hidden.to(wide), dim=-1)
        if taught.memory is not None:
            return self.go_on(keys, taught).to(hidden.dtype)
        values = settings.inplace_lr * self.values(taught).to(wide)
        return self.write(keys, values, taught.docs, settings.inplace_chunk, settings.inplace_momentum,
                          settings.inplace_decay).to(hidden.dtype)

    def go_on(self, keys: Tensor, taught: Taught) -> Tensor:
        """The same behind the tokens in the memory, which holds what is written, and of the chunk that is not whole yet
        its keys and its stream."""
        memory, settings, out, begin = taught.memory, self.settings, [], 0
        key = taught.visit, "written"
        none = keys.new_zeros(len(keys), keys.shape[2], taught.stream.shape[2])
        held, again, waiting, stream = memory.held.get(key, (none, none, keys[:, :0], taught.stream[:, :0]))
        while begin < keys.shape[1]:
            part = slice(begin, begin + settings.inplace_chunk - waiting.shape[1])
            out.append(keys[:, part] @ held)
            waiting = torch.cat([waiting, keys[:, part]], 1)
            stream = torch.cat([stream, taught.stream[:, part]], 1)
            begin += out[-1].shape[1]
            if waiting.shape[1] == settings.inplace_chunk:
                values = settings.inplace_lr * self.values(Taught(stream, None)).to(keys.dtype)
                again = settings.inplace_momentum * again + waiting.mT @ values
                held = settings.inplace_decay * held + again
                waiting, stream = waiting[:, :0], stream[:, :0]
        memory.held[key] = held, again, waiting, stream
        return torch.cat(out, 1)


# What learns beside a matrix while a text is read.
LEARNERS: dict[str, type[nn.Module]] = {"written": Written}


class FeedForward(nn.Module):
    """Two matrices around an activation, on request with a norm before the second, and with what the text writes beside
    that. Sources: Primer (squared ReLU), PR 549 of the challenge (with a slope), its ternary record (the norm)."""

    def __init__(self, settings: ModelSettings, plan: BlockPlan, kernels: "Picked", hidden: int = 0) -> None:
        super().__init__()
        width, hidden, self.settings = settings.model_dim, hidden or plan.hidden, settings
        self.written = LEARNERS["written"](settings, kernels.others["written"]) if plan.learns else None
        self.fused = kernels.mlp if plain_mlp(settings) and not plan.learns else None
        self.act = ACTIVATIONS[settings.mlp_act]
        self.up = Linear(width, hidden, settings.matrix_init)
        self.down = Linear(hidden, width, 0.0)

    def inner(self, hidden: Tensor) -> Tensor:
        """What stands between the matrices, (..., F) -> (..., F)."""
        hidden = self.act(hidden, self.settings)
        return rms_norm(hidden, self.settings.norm_eps) if self.settings.extra_norms else hidden

    def find(self, n: Tensor, sites: Sites, deltas: Deltas | None, taught: Taught | None = None) -> Tensor:
        """What it finds in n (B, T, D), without paths beside the whole."""
        if self.fused is not None and (deltas is None or not (sites.up in deltas or sites.down in deltas)):
            return self.fused(n, self.up.weight, self.down.weight, self.settings.mlp_slope)
        hidden = self.inner(self.up(n, sites.up, deltas))  # (B, T, F)
        y = self.down(hidden, sites.down, deltas)
        return y if self.written is None else y + self.written(hidden, taught)

    def forward(self, n: Tensor, sites: Sites, deltas: Deltas | None, taught: Taught | None = None) -> Tensor:
        """n (B, T, D), normalised -> (B, T, D)."""
        return add_delta(self.find(n, sites, deltas, taught), n, sites.mlp, deltas)


LOAD_SHARE = 1e-6  # of a load in a gradient: nothing in the norm of all gradients, for only its sign is used


class Balance(torch.autograd.Function):
    """Hands shares through; the gradient of the biases is how far each expert's load is from the mean."""

    @staticmethod
    def forward(ctx: Any, shares: Tensor, biases: Tensor, load: Tensor) -> Tensor:  # noqa: D102
        ctx.save_for_backward(load)
        return shares.view_as(shares)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # noqa: D102
        load, = ctx.saved_tensors
        return grad, LOAD_SHARE * (load - load.mean()), None


class Experts(nn.Module):
    """A feed-forward in parts: some that every token takes, and experts of which each token chooses MOE_TOPK by the
    sigmoid of a score. Biases that balance the load choose but never weigh; they follow the signs of the load's
    differences, summed over micro-batches and ranks like gradients. The shares of several experts sum to 1; a single
    one's is twice its score, so that it is weighed at all. Sources: DeepSeek-V3; Wang et al. 2024, Auxiliary-Loss-Free
    Load Balancing."""

    def __init__(self, settings: ModelSettings, plan: BlockPlan, kernels: "Picked") -> None:
        super().__init__()
        width, self.settings, self.run = expert_width(settings, plan), settings, kernels.others["experts"]
        self.router = make_parameter((plan.experts, settings.model_dim), "gate", "faint")
        self.biases = make_parameter((plan.experts,), "balance", 0.0)
        self.shared = FeedForward(settings, plan, kernels, settings.moe_shared * width) if settings.moe_shared else None
        alone = plan._replace(learns=False)
        self.routed = nn.ModuleList(FeedForward(settings, alone, kernels, width) for _ in range(plan.experts))

    def picked(self, scores: Tensor) -> Tensor:
        """Experts (N, k) with the largest of balanced scores (N, E)."""
        return scores.topk(min(self.settings.moe_topk, scores.shape[1])).indices

    def tell(self, scores: Tensor) -> dict[str, float]:
        """How much more than the mean the busiest expert has, for the log."""
        load = self.picked(scores.flatten(0, -2)).flatten().bincount(minlength=scores.shape[-1]).float()
        return {"imbalance": float(load.max() / load.mean()) - 1}

    def choose(self, n: Tensor, site: str, deltas: Deltas | None, live: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Experts (N, k) of tokens n (N, D), and the shares of what they find, fp32; tokens of which `live` (N, 1) is 0
        are no load."""
        scores = F.linear(n.float(), self.router.float()).sigmoid()
        chosen = self.picked(add_delta(scores.detach() + self.biases.detach(), n, site, deltas))
        taken = scores.gather(1, chosen)
        shares = 2 * taken if chosen.shape[1] == 1 else taken / taken.sum(1, keepdim=True)
        load = torch.zeros_like(scores).scatter_(1, chosen, 1.0)
        load = (load if live is None else load * live).mean(0)
        return chosen, Balance.apply(shares, self.biases, load)

    def forward(self, n: Tensor, sites: Sites, deltas: Deltas | None, taught: Taught | None = None) -> Tensor:
        """n (B, T, D), normalised -> (B, T, D)."""
        flat, first = n.flatten(0, -2), self.routed[0]
        live = None if taught is None or taught.live is None else taught.live.expand(*n.shape[:-1], 1).reshape(-1, 1)
        chosen, shares = self.choose(flat, sites.route, deltas, live)
        named = [sites._replace(up=f"{sites.up}{expert}", down=f"{sites.down}{expert}")
                 for expert in range(len(self.routed))]
        watched = deltas is not None and any(site in deltas for own in named for site in (own.up, own.down))
        if watched or first.up.path is not None or first.up.rounds:
            y = torch.zeros_like(flat)
            for expert, (own, part) in enumerate(zip(named, self.routed, strict=True)):
                picked = chosen == expert
                # Tokens of other experts enter as zeros, which count for nothing in the moments of this one's inputs.
                found = part.find(flat * picked.any(1, keepdim=True), own, deltas)
                y = y + (picked * shares).sum(1, keepdim=True).to(y.dtype) * found
        else:
            ups, downs = (torch.stack([getattr(part, name).weight for part in self.routed]) for name in ("up", "down"))
            y = self.run(flat, ups, downs, chosen, shares, first.inner)
        y = y.view_as(n) if self.shared is None else y.view_as(n) + self.shared.find(n, sites, deltas, taught)
        return add_delta(y, n, sites.mlp, deltas)


FEEDS: dict[str, type[nn.Module]] = {"whole": FeedForward, "experts": Experts}


class SmearGate(nn.Module):
    """Each embedding takes a share of the one before, gated by its own first channels; never across the beginning of a
    document. Source: PR 1667 of the challenge, mended at BOS by PR 1851."""

    def __init__(self, settings: ModelSettings, vocab_size: int) -> None:
        super().__init__()
        self.window = settings.gate_window
        self.weight = make_parameter((1, self.window), "gate", 0.0)
        self.strength = make_parameter((1,), "gate", 0.0)

    def forward(self, e: Tensor, tokens: Tensor, deltas: Deltas | None) -> Tensor:
        """e (B, T, D), tokens (B, T) -> (B, T, D)."""
        share = self.strength.to(e.dtype) * torch.sigmoid(F.linear(e[..., :self.window], self.weight.to(e.dtype)))
        before = F.pad(e[:, :-1], (0, 0, 1, 0))
        return e + share * before * (tokens != BOS)[..., None]


HASH_FACTORS = (36313, 27191, 51439)


class GramHash(nn.Module):
    """Embeddings of pairs of tokens, and of triples, from one hashed table, zero at first, through a matrix and a
    learned scale. A token whose predecessor belongs to another document has the last row. Source: BigramHash of the
    challenge's records of March."""

    def __init__(self, settings: ModelSettings, vocab_size: int) -> None:
        super().__init__()
        self.rows, self.orders = settings.bigram_vocab_size, (2, 3) if settings.trigram else (2,)
        self.table = make_parameter((self.rows, settings.bigram_dim), "table", 0.0)
        self.proj = Linear(settings.bigram_dim, settings.model_dim, settings.matrix_init)
        self.scale = make_parameter((1,), "gain", 0.05)

    def index(self, tokens: Tensor, order: int) -> Tensor:
        """Rows (B, T) of the last `order` tokens of each position; the last row where they span documents."""
        back = [F.pad(tokens, (shift, 0), value=-1)[:, :tokens.shape[1]] for shift in range(order)]
        whole, mixed = back[-1] >= 0, HASH_FACTORS[0] * tokens
        for nearer, token, factor in zip(back, back[1:], HASH_FACTORS[1:], strict=False):
            whole, mixed = whole & (nearer != BOS), mixed ^ (factor * token)
        return torch.where(whole, mixed % (self.rows - 1), self.rows - 1)

    def forward(self, e: Tensor, tokens: Tensor, deltas: Deltas | None) -> Tensor:
        """e (B, T, D), tokens (B, T) -> (B, T, D)."""
        found = sum(F.embedding(self.index(tokens, order), self.table) for order in self.orders).to(e.dtype)
        return e + self.scale.to(e.dtype) * self.proj(found, "bigram.proj", deltas)


def place_in_document(docs: Tensor) -> Tensor:
    """The position of each token in its document, or in what the row holds of it, int64 (B, T)."""
    index = torch.arange(docs.shape[1], device=docs.device).expand_as(docs)
    begins = F.pad(docs[:, 1:] != docs[:, :-1], (1, 0))
    return index - torch.where(begins, index, 0).cummax(1).values


GOLDEN_RATIO = (1 + 5 ** 0.5) / 2
RADIAL_BITS, RADIAL_STEP = 8, 0.25  # as published


def radial_features(rows: int, smooth: bool) -> np.ndarray:
    """Features (rows, 4) of the numbers 0 .. rows - 1: bit i of a number is a vector of length RADIAL_STEP phi^i at the
    angle 2 pi i / bits, and the sum of a number's vectors gives its two coordinates, length and angle. Smooth (rows,
    5): with as many bits as the rows need, the length's logarithm and the unit vector instead of length and angle,
    and each feature at unit variance. Source: Radial-BitNet."""
    bits = max(1, (rows - 1).bit_length()) if smooth else RADIAL_BITS
    index = np.arange(bits)
    steps = RADIAL_STEP * GOLDEN_RATIO ** index * np.exp(2j * np.pi * index / bits)
    total = ((np.arange(rows)[:, None] >> index & 1) * steps).sum(1)
    size = np.abs(total)
    if not smooth:
        return np.stack([total.real, total.imag, size, np.angle(total)], 1)
    unit = total / (size + 1e-6)
    found = np.stack([total.real, total.imag, np.log1p(size), unit.real, unit.imag], 1)
    return (found - found.mean(0)) / found.std(0)


class Positions(nn.Module):
    """Tells every token its place in its document: a learned vector, or a product of radial features."""

    def __init__(self, settings: ModelSettings, vocab_size: int) -> None:
        super().__init__()
        self.rows, kind = settings.position_rows, settings.positions
        learned = kind == "learned"
        self.table = make_parameter((self.rows, settings.model_dim), "table", "gaussian") if learned else None
        features = None if learned else torch.from_numpy(radial_features(self.rows, kind == "radial_smooth")).float()
        self.register_buffer("features", features, persistent=False)
        self.proj = None if learned else Linear(features.shape[1], settings.model_dim, settings.matrix_init)

    def forward(self, e: Tensor, tokens: Tensor, deltas: Deltas | None) -> Tensor:
        """e (B, T, D), tokens (B, T) -> (B, T, D)."""
        place = place_in_document(document_index(tokens)) % self.rows
        if self.table is not None:
            return e + F.embedding(place, self.table).to(e.dtype)
        return e + self.proj(self.features[place].to(e.dtype), "positions.proj", deltas)


class ValueEmbedding(nn.Module):
    """One table of values for all blocks that VE_LAYERS names. Source: modded-nanogpt, and records of the challenge."""

    def __init__(self, settings: ModelSettings, vocab_size: int) -> None:
        super().__init__()
        self.channels = settings.model_dim // settings.num_heads
        self.table = make_parameter((vocab_size, settings.ve_dim), "table", "value")
        self.proj = Linear(settings.ve_dim, settings.num_kv_heads * self.channels, settings.matrix_init)

    def forward(self, tokens: Tensor, dtype: torch.dtype, deltas: Deltas | None) -> Tensor:
        """tokens (B, T) -> (B, T, K, C)."""
        found = F.embedding(tokens, self.table).to(dtype)
        return self.proj(found, "values.proj", deltas).unflatten(-1, (-1, self.channels))


def short_conv(x: Tensor, weight: Tensor, docs: Tensor | None) -> Tensor:
    """A causal convolution of every channel, within documents: x (B, T, C), weight (C, W), whose last column is the own
    position's; docs (B, T) or None."""
    out = x * weight[:, -1]
    for back in range(1, min(weight.shape[1], x.shape[1])):
        before = F.pad(x[:, :-back], (0, 0, back, 0))
        if docs is not None:
            before = before * F.pad(docs[:, back:] == docs[:, :-back], (back, 0))[..., None]
        out = out + before * weight[:, -1 - back]
    return out


class Recurrent(nn.Module):
    """What recurrent mixers share: queries, keys and values of each head through short convolutions and silu; raw gates
    of each head in fp32; a norm and, on request, a gate on what comes out. A row says how many GATES it has and what
    it recalls: recall(q, k, v, gates, context), q, k, v (B, T, H, C) in fp32, raw gates (B, T, H) -> (B, T, H, V)."""

    GATES = 0

    def __init__(self, settings: ModelSettings, plan: BlockPlan, kernels: Picked) -> None:
        super().__init__()
        width, heads, self.plan, self.settings = settings.model_dim, plan.heads, plan, settings
        self.q = Linear(width, heads * plan.key, settings.matrix_init)
        self.k = Linear(width, heads * plan.key, settings.matrix_init)
        self.v = Linear(width, heads * plan.value, settings.matrix_init)
        self.gate = Linear(width, heads * plan.value, settings.matrix_init) if plan.gated else None
        self.o = Linear(heads * plan.value, width, 0.0)
        self.convs = nn.ParameterDict({name: make_parameter((heads * channels, plan.conv), "gate", "uniform")
                                       for name, channels in (("q", plan.key), ("k", plan.key), ("v", plan.value))
                                       if plan.conv})
        self.gates = make_parameter((self.GATES * heads, width), "gate", "faint")
        self.out_gain = make_parameter((plan.value,), "gain", 1.0)

    def read(self, part: str, n: Tensor, context: Context, sites: Sites, deltas: Deltas | None) -> Tensor:
        """Queries (q), keys (k) or values (v) of n (B, T, D), in the heads' channels (B, T, H, C)."""
        x = getattr(self, part)(n, getattr(sites, part), deltas)
        if self.plan.conv:
            whole = x if context.memory is None or self.plan.conv == 1 else context.memory.extend(
                (context.visit, part), x, self.plan.conv - 1)
            x = short_conv(whole, self.convs[part].to(x.dtype), context.docs)[:, whole.shape[1] - x.shape[1]:]
        return F.silu(x).unflatten(-1, (self.plan.heads, -1))

    def forward(self, n: Tensor, context: Context, sites: Sites, deltas: Deltas | None) -> tuple[Tensor, None]:
        """n (B, T, D), normalised -> what it adds (B, T, D), and None: it has no values for others."""
        parts = [self.read(part, n, context, sites, deltas) for part in "qkv"]
        return self.finish(self.recalled(n, parts, context, sites, deltas), n, context, sites, deltas), None

    def tell(self, raw: Tensor) -> dict[str, float]:
        """Means of its gates, for the log, from raw ones (B, T, GATES * H)."""
        return {}

    def recalled(self, n: Tensor, parts: list[Tensor], context: Context, sites: Sites, deltas: Deltas | None
                 ) -> Tensor:
        """What the heads bring, (B, T, H, V) in fp32, for n (B, T, D) and its queries, keys and values."""
        wide = torch.promote_types(n.dtype, torch.float32)
        raw = add_delta(F.linear(n.to(wide), self.gates.to(wide)), n, sites.gates, deltas)
        return self.recall(*(part.to(wide) for part in parts), self.apart(raw), context)

    def apart(self, raw: Tensor) -> list[Tensor]:
        """Raw gates (B, T, GATES * H) as one (B, T, H) each."""
        return list(raw.unflatten(-1, (self.GATES, -1)).unbind(-2))

    def finish(self, y: Tensor, n: Tensor, context: Context, sites: Sites, deltas: Deltas | None) -> Tensor:
        """What y (B, T, H, V) adds to the stream, (B, T, D)."""
        y = (rms_norm(y, self.settings.norm_eps) * self.out_gain.to(y.dtype)).to(n.dtype).flatten(2)
        if self.gate is not None:
            y = y * F.silu(self.gate(n, sites.gate, deltas))
        out = self.o(y, sites.o, deltas)
        beside = self.beside(y, context, sites, deltas)
        return add_delta(out if beside is None else out + beside, n, sites.attn, deltas)

    def beside(self, y: Tensor, context: Context, sites: Sites, deltas: Deltas | None) -> Tensor | None:
        """What stands beside the matrix o: (B, T, D) from its input y (B, T, H * V); None is nothing."""
        return None


class DeltaNet(Recurrent):
    """The delta rule with unit keys; on request with strengths up to 2, whose states turn around (source: Grazzi et al.
    2024), or with the exact step for keys of any length (source: EFLA)."""

    GATES = 1

    def __init__(self, settings: ModelSettings, plan: BlockPlan, kernels: Picked) -> None:
        super().__init__(settings, plan, kernels)
        self.rule = kernels.others["delta"]
        self.beta_bias = make_parameter((plan.heads,), "gain", 0.0)

    def strength(self, k: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and how strongly each is written, (B, T, H)."""
        beta = (raw + self.beta_bias.to(raw.dtype)).sigmoid()
        if self.settings.efla:
            length = k.square().sum(-1).clamp_min(1e-12)
            return k, -torch.expm1(-beta * length) / length
        return F.normalize(k, dim=-1), 2 * beta if self.settings.allow_neg_eigval else beta

    def tell(self, raw: Tensor) -> dict[str, float]:
        own = self.apart(raw)
        decay, beta = self.decay(own), (own[0] + self.beta_bias.to(raw.dtype)).sigmoid()
        beta = beta * 2 if self.settings.allow_neg_eigval else beta
        return {**({} if decay is None else {"alpha": float(decay.exp().mean())}), "beta": float(beta.mean())}

    def decay(self, raw: list[Tensor]) -> Tensor | None:
        """The logarithm of what is left of the state at each token, (B, T, H); None is all of it."""
        return None

    def recall(self, q: Tensor, k: Tensor, v: Tensor, gates: list[Tensor], context: Context) -> Tensor:
        k, beta = self.strength(k, gates[0])
        where = context.mask if isinstance(context.mask, Spans) else context.docs
        return context.go_on(self.rule, (F.normalize(q, dim=-1), k, v, beta, self.decay(gates)), where,
                             self.settings.mixer_chunk)


class GatedDeltaNet(DeltaNet):
    """The delta rule on a state that fades: e^g with g = -exp(A_log) softplus(raw + dt_bias). Source: Gated Delta
    Networks, Yang et al. 2024; starts as there."""

    GATES = 2

    def __init__(self, settings: ModelSettings, plan: BlockPlan, kernels: Picked) -> None:
        super().__init__(settings, plan, kernels)
        self.a_log = make_parameter((plan.heads,), "gain", "decay")
        self.dt_bias = make_parameter((plan.heads,), "gain", "pace")

    def decay(self, raw: list[Tensor]) -> Tensor:
        return -self.a_log.exp().to(raw[1].dtype) * F.softplus(raw[1] + self.dt_bias.to(raw[1].dtype))


KNOT_NEAR = 64  # earlier codes of the document whose majority a code should agree with
KNOT_FLIPS = 0.02  # share of the bits that one relaxation may turn, rounded, one at least
KNOT_MEMORY, KNOT_BINDING = 0.3, 0.2


def knot_fields(codes: Tensor, docs: Tensor | None) -> Tensor:
    """What the codes (B, L, K) of -1 and 1 before a position want its bits to be: KNOT_MEMORY times the majority of the
    last KNOT_NEAR ones of the document (0 where they are even), and KNOT_BINDING times the last one turned by a bit;
    zeros at the beginning of a document. docs (B, L) or None. (B, L, K)."""
    length = codes.shape[1]
    place = torch.arange(length, device=codes.device)[None] if docs is None else place_in_document(docs)
    sums = F.pad(codes.cumsum(1), (0, 0, 1, 0))  # of the first t codes
    first = torch.arange(length, device=codes.device) - place.clamp_max(KNOT_NEAR)
    near = sums[:, :-1] - sums.gather(1, first.expand(len(codes), -1)[..., None].expand_as(codes))
    last = F.pad(codes[:, :-1], (0, 0, 1, 0)).roll(1, -1) * (place > 0)[..., None]
    return KNOT_MEMORY * near.sign() + KNOT_BINDING * last


class SpanKnot(GatedDeltaNet):
    """A gated delta rule with a binary code beside its output: b = sign(W_s y), relaxed once and brought in by a matrix
    that begins at zero. The code's energy is the sum over bits of -b W_e y and of its disagreements with knot_fields;
    a bit's part hangs on no other bit, so the relaxation turns those KNOT_FLIPS of the bits whose turn lowers it most,
    and none that would raise it. Gradients go through tanh(W_s y + W_e y). Signs and turns are steps: where sums are
    rounded otherwise, a bit may differ. Chimera's configuration names this layer and its weights and defines neither
    bits nor turns: this is its causal form, without the energies of a grammar and of obligations, the memory's and the
    binding's summed like the state's, and bound to the code before instead of to learned roles."""

    def __init__(self, settings: ModelSettings, plan: BlockPlan, kernels: Picked) -> None:
        super().__init__(settings, plan, kernels)
        width, bits = plan.heads * plan.value, settings.knot_bits
        self.code = Linear(width, bits, settings.matrix_init)
        self.field = Linear(width, bits, settings.matrix_init)
        self.knot = Linear(bits, settings.model_dim, 0.0)

    def beside(self, y: Tensor, context: Context, sites: Sites, deltas: Deltas | None) -> Tensor:
        wide = torch.promote_types(y.dtype, torch.float32)
        own, field = self.code(y, sites.code, deltas).to(wide), self.field(y, sites.field, deltas).to(wide)
        codes = torch.where(own.detach() < 0, -1.0, 1.0).to(wide)
        whole = codes if context.memory is None else context.memory.extend((context.visit, "knot"), codes, KNOT_NEAR)
        before = knot_fields(whole, context.docs)[:, whole.shape[1] - y.shape[1]:]
        # Half of what the energy falls by when a bit turns.
        falls = -codes * (field.detach() + before / 2)
        most, at = falls.topk(max(1, round(KNOT_FLIPS * codes.shape[-1])), -1)
        codes = codes * torch.ones_like(codes).scatter(-1, at, torch.where(most > 0, -1.0, 1.0).to(wide))
        soft = (own + field).tanh()
        return self.knot((soft + (codes - soft).detach()).to(y.dtype), sites.knot, deltas)


GATE_CAP = 15.0


class MLSTM(Recurrent):
    """A matrix memory with an exponential input gate, both raw gates soft-capped. Source: Beck et al. 2024, xLSTM;
    biases as in xLSTM 7B."""

    GATES = 2

    def __init__(self, settings: ModelSettings, plan: BlockPlan, kernels: Picked) -> None:
        super().__init__(settings, plan, kernels)
        self.rule = kernels.others["mlstm"]
        self.input_bias = make_parameter((plan.heads,), "gain", -10.0)
        self.forget_bias = make_parameter((plan.heads,), "gain", "forget")

    def recall(self, q: Tensor, k: Tensor, v: Tensor, gates: list[Tensor], context: Context) -> Tensor:
        enter, forget = (bend(raw + bias.to(raw.dtype), GATE_CAP)
                         for raw, bias in zip(gates, (self.input_bias, self.forget_bias), strict=True))
        return context.go_on(self.rule, (q, k, v, enter, forget), context.docs, self.settings.mixer_chunk)


MOST_MOMENTUM = 0.95
DEEP_RATE = 0.1  # at 0.25 and more a document of like tokens lets a deep memory grow without bound


class Titans(Recurrent):
    """A memory that learns keys to values as it reads, with momentum and forgetting: a matrix, or two with a hidden
    layer between them; what it recalls is the output or, with TITANS_CONTEXT, stands as further keys and values, beside
    learned ones, before the tokens of an attention. Source: Behrouz et al. 2024, Titans (memory as a layer, memory as
    context); there a segment's memory waits for the attention of the one before, here it learns from the stream."""

    GATES = 3

    def __init__(self, settings: ModelSettings, plan: BlockPlan, kernels: Picked) -> None:
        super().__init__(settings, plan, kernels)
        heads, deep = plan.heads, settings.titans_depth == 2
        self.rule, self.attend = kernels.others["deep" if deep else "titans"], kernels.attention
        self.forget_bias = make_parameter((heads,), "gain", -4.0)
        self.momentum_bias = make_parameter((heads,), "gain", 0.0)
        self.rate_bias = make_parameter((heads,), "gain", 0.0)
        hidden = 2 * plan.key
        self.first = make_parameter((heads, hidden, plan.key), "gate", "uniform") if deep else None
        self.second = make_parameter((heads, plan.value, hidden), "gate", "uniform") if deep else None
        slots = settings.persistent_slots if settings.titans_context else 0
        self.slots = make_parameter((2, slots, heads, plan.key), "table", "value") if slots else None
        self.dims = max(0, settings.rope_dims or plan.key)
        self.q_gain = make_parameter((heads,), "gain", settings.qk_gain_init) if settings.titans_context else None

    def recall(self, q: Tensor, k: Tensor, v: Tensor, gates: list[Tensor], context: Context) -> Tensor:
        forget, momentum, rate = (
            (raw + bias.to(raw.dtype)).sigmoid()
            for raw, bias in zip(gates, (self.forget_bias, self.momentum_bias, self.rate_bias), strict=True))
        size, more, momentum = self.settings.mixer_chunk, (), MOST_MOMENTUM * momentum
        # Momentum repeats a step 1 / (1 - momentum) times: the sum, not the first, is bounded by 1.
        rate = rate * (1 - momentum)
        if self.first is not None:
            # All tokens of a chunk learn at the same weights, so each takes its share of a step.
            rate, more, v = DEEP_RATE * rate / size, (self.first, self.second), rms_norm(v, self.settings.norm_eps)
        return context.go_on(self.rule, (F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, 1 - forget, momentum, rate,
                                         *more), context.docs, size)

    def forward(self, n: Tensor, context: Context, sites: Sites, deltas: Deltas | None) -> tuple[Tensor, None]:
        """As Recurrent's; with TITANS_CONTEXT attention over what is recalled and what is there."""
        if not self.settings.titans_context:
            return super().forward(n, context, sites, deltas)
        q, k, v = parts = [self.read(part, n, context, sites, deltas) for part in "qkv"]
        recalled = self.recalled(n, parts, context, sites, deltas)
        recalled = rms_norm(recalled, self.settings.norm_eps).to(n.dtype).flatten(2)
        past_k, past_v = (self.read(part, recalled, context, sites, deltas) for part in "kv")
        cos, sin = rotary_tables(n.shape[1], self.dims, self.settings, n, context.stretch)
        if context.docs is not None:
            # Slots stand at the beginning of every document, so positions are counted from there.
            cos, sin = (table[place_in_document(context.docs)] for table in (cos, sin))
        q, k, past_k = (rotate(rms_norm(x, self.settings.norm_eps), cos, sin) for x in (q, k, past_k))
        keys, values, seen = [past_k, k], [past_v, v], attention_mask(context.docs, n.shape[:2])
        if seen is None:
            seen = torch.ones(n.shape[1], n.shape[1], dtype=torch.bool, device=n.device).tril()[None, None]
        seen = torch.cat([seen, seen], -1)
        if self.slots is not None:
            slots = self.slots.to(n.dtype).expand(len(n), -1, -1, -1, -1)  # (B, 2, S, H, C)
            keys, values = [rms_norm(slots[:, 0], self.settings.norm_eps), *keys], [slots[:, 1], *values]
            seen = F.pad(seen, (slots.shape[2], 0), value=True)
        y = self.attend(q * self.q_gain.to(n.dtype)[:, None], torch.cat(keys, 1), torch.cat(values, 1), seen)
        return self.finish(y, n, context, sites, deltas), None


MIXERS: dict[str, type[nn.Module]] = {"A": Attention, "D": DeltaNet, "G": GatedDeltaNet, "X": MLSTM, "T": Titans,
                                      "K": SpanKnot}


class Smear(nn.Module):
    """Each channel of a normalised embedding becomes a learned mean of its own and of the one before, within documents;
    half and half at the start. Source: clowncar's SmearGate, mended at the beginning of documents."""

    def __init__(self, settings: ModelSettings, vocab_size: int) -> None:
        super().__init__()
        self.share = make_parameter((settings.model_dim,), "gate", 0.0)

    def forward(self, e: Tensor, tokens: Tensor, deltas: Deltas | None) -> Tensor:
        """e (B, T, D), tokens (B, T) -> (B, T, D)."""
        before = F.pad(e[:, :-1], (0, 0, 1, 0)) * (tokens != BOS)[..., None]
        return torch.lerp(e, before, self.share.sigmoid().to(e.dtype))


# Parts beside the blocks that read tokens. The first three change the embeddings, in this order, the fourth what is
# left of them when they are normalised.
TOKEN_PARTS: dict[str, type[nn.Module]] = {"positions": Positions, "bigram": GramHash, "smear": SmearGate,
                                           "blend": Smear, "values": ValueEmbedding}


class Retrieval(nn.Module):
    """Adds to a final state, through a factor for each channel that begins at zero, what followed the states most like
    it in the same document. Codes are signs; their gradient is tanh's. Source: kNN-LM (Khandelwal et al. 2020) within
    one document, with the binary codes of Chimera's semantic memory."""

    def __init__(self, settings: ModelSettings, recall: Callable[..., Tensor]) -> None:
        super().__init__()
        self.settings, self.recall = settings, recall
        self.code = Linear(settings.model_dim, settings.retrieval_bits, settings.matrix_init)
        self.sharp = make_parameter((1,), "gain", 8.0)
        self.strength = make_parameter((settings.model_dim,), "gate", 0.0)

    def forward(self, hidden: Tensor, stream: Tensor, context: Context, deltas: Deltas | None) -> Tensor:
        """Final states and embedding stream (B, T, D) -> (B, T, D)."""
        soft = self.code(hidden, "retrieval.code", deltas).float().tanh()
        codes, length = soft + (torch.where(soft < 0, -1.0, 1.0) - soft).detach(), hidden.shape[1]
        if context.memory is not None:
            codes = context.memory.extend((-1, "codes"), codes)
            stream = context.memory.extend((-1, "stream"), stream)
        found = self.recall(codes, stream, context.docs, self.settings.retrieval_top, self.sharp, length)
        return hidden + self.strength.to(hidden.dtype) * found


BRACKETS = ("()", "[]", "{}", "\u201c\u201d")
OPEN_LEVELS = 4  # up to which it is known where a bracket was opened
RESET = 1 << 40  # more than can be open
LONG_OPEN = 32  # tokens


def sum_since(x: Tensor, begins: Tensor, start: Tensor) -> Tensor:
    """The sum of x (B, T) from the last position on at which `begins` (B, T) is set, its own included; where there is
    none yet, of all, and `start` (B, 1)."""
    sums, place = x.cumsum(1), torch.arange(x.shape[1], device=x.device)
    last = torch.where(begins, place, -1).cummax(1).values
    before = (sums - x).gather(1, last.clamp_min(0))
    return sums - torch.where(last < 0, -start, before)


def grammar_features(facts: Tensor, begins: Tensor, state: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """What is open behind each token, from Grammar's facts of the tokens (B, T, F) int64, where documents begin (B, T)
    and the state before (B, S), `first` tokens on: whether brackets of each kind are open, whether the innermost is of
    it (of several that a token opens, all are); two round ones, three of all; a straight quote in this line; code; the
    line's end; a list; brackets over 8; and whether the innermost was opened LONG_OPEN tokens ago. fp32 (B, T,
    Grammar.FEATURES), and the state behind the last token.

    A token maps a count x to max(x + change, least). Maps of that form follow each other by sums and maxima, so all
    positions are found at once; a document begins with a map that leaves nothing. The innermost bracket of d is the one
    that last made d of fewer; from OPEN_LEVELS on it is taken for the one of that level."""
    kinds, length = len(BRACKETS), facts.shape[1]
    facts = facts.mT  # time is last, where sums over it are quick
    change, least, (quotes, code, breaks, ends, items) = (
        facts[:, :kinds], facts[:, kinds:2 * kinds], facts[:, 2 * kinds:].unbind(1))
    held, opened, (quote, open_code, line, item) = (
        state[:, :kinds, None], state[:, kinds:-4].unflatten(1, (kinds, OPEN_LEVELS))[..., None],
        state[:, -4:, None].unbind(1))
    sums = (change - RESET * begins[:, None]).cumsum(-1)
    counts = sums + torch.maximum((least - sums).cummax(-1).values, held)  # (B, kinds, T)
    levels = torch.arange(1, OPEN_LEVELS + 1, device=facts.device)[:, None]
    made = (levels <= counts[:, :, None]) & (levels > (counts - least)[:, :, None])
    place = first + torch.arange(length, device=facts.device)
    opened = torch.maximum(torch.where(made, place, -1).cummax(-1).values, opened)  # (B, kinds, levels, T)
    innermost = opened.gather(2, counts.clamp(1, OPEN_LEVELS)[:, :, None] - 1)[:, :, 0].where(counts > 0, -1)
    newest = innermost.amax(1)
    after = torch.cat([line > 0, ends[:, :-1] > 0], 1) & ~begins  # the line's first token
    quote = sum_since(quotes, begins | (breaks > 0), quote) % 2
    open_code = sum_since(code, begins, open_code) % 2
    item = sum_since(items * (after | (breaks > 0)), after | begins | (breaks > 0), item)
    features = torch.cat([counts > 0, (innermost == newest[:, None]) & (innermost >= 0), torch.stack([
        counts[:, 0] > 1, counts.sum(1) > 2, quote > 0, open_code > 0, ends > 0, item > 0, counts.sum(1) / 8,
        (newest >= 0) & (place - newest >= LONG_OPEN)], 1)], 1).float().mT
    lines = torch.stack([quote, open_code, ends, item], 1)
    end = torch.cat([counts[..., -1], opened[..., -1].flatten(1), lines[..., -1]], 1)
    return features, end


class Grammar(nn.Module):
    """Adds to a final state a vector for each of grammar_features, zero at the start: through the embedding a bias of
    the logits by what the text has left open. What a token does is the tokenizer's and stands in the artifact's header:
    for each kind of BRACKETS by how many it changes and how many it leaves open itself; the straight quotes behind its
    last line break; its backticks; whether it has a line break, ends with one (as the beginning of a document does),
    and begins a list with what stands behind its last one. Source: Chimera's grammar and debt ledger, which added one
    number to all logits."""

    FACTS = 2 * len(BRACKETS) + 5
    STATE = len(BRACKETS) * (1 + OPEN_LEVELS) + 4
    FEATURES = 2 * len(BRACKETS) + 8

    def __init__(self, settings: ModelSettings, vocab_size: int) -> None:
        super().__init__()
        self.bias = make_parameter((settings.model_dim, self.FEATURES), "gate", 0.0)
        self.register_buffer("facts", torch.zeros(vocab_size, self.FACTS, dtype=torch.int8), persistent=False)

    @classmethod
    def facts_of(cls, tokenizer: Any) -> np.ndarray:
        """What every token does, int8 (V, F)."""
        facts, kinds = np.zeros((tokenizer.vocab_size(), cls.FACTS), np.int8), len(BRACKETS)
        facts[BOS, -2] = 1
        for token in range(len(facts)):
            if tokenizer.is_control(token) or tokenizer.is_unknown(token) or tokenizer.is_unused(token):
                continue
            piece = tokenizer.id_to_piece(token).replace("\u2581", " ")
            text = chr(int(piece[1:-1], 16)) if tokenizer.is_byte(token) else piece
            for kind, (opens, closes) in enumerate(BRACKETS):
                for sign in text:
                    if change := (sign == opens) - (sign == closes):
                        facts[token, kind] += change
                        facts[token, kinds + kind] = max(0, facts[token, kinds + kind] + change)
            tail = text.rpartition("\n")[2]
            facts[token, 2 * kinds:] = (tail.count('"'), text.count("`"), "\n" in text, text.endswith("\n"),
                                        bool(re.match(r"\s*([-*\u2022]|\d+[.)])", tail)))
        return facts

    @staticmethod
    def write(facts: np.ndarray) -> list[list[int]]:
        """Facts (V, F) for a header: token, column and value of what is not zero."""
        return np.column_stack([*facts.nonzero(), facts[facts != 0]]).tolist()

    @classmethod
    def read(cls, rows: Any, vocab_size: int) -> np.ndarray:
        """The inverse; ValueError where it is damaged."""
        facts, last = np.zeros((vocab_size, cls.FACTS), np.int8), [-1, 0]
        for row in rows if isinstance(rows, list) else [None]:
            if not isinstance(row, list) or len(row) != 3 or any(type(number) is not int for number in row) or not (
                    row[:2] > last and row[0] < vocab_size and 0 <= row[1] < cls.FACTS and row[2] and
                    -127 * (row[1] < len(BRACKETS)) <= row[2] <= 127):
                raise ValueError(f"grammar: {str(row)[:60]!r} is no token, column and value that could stand there")
            facts[row[0], row[1]], last = row[2], row[:2]
        return facts

    @classmethod
    def told(cls, facts: np.ndarray) -> str:
        """A line on what tokens with these facts (N, F) can open. ConfigError where it is nothing."""
        kinds = len(BRACKETS)
        found = {"brackets": facts[:, :2 * kinds].any(1).sum(), **dict(zip(
            ("quotes", "code", "line_breaks"), (facts[:, 2 * kinds:2 * kinds + 3] != 0).sum(0), strict=True)),
            "lists": facts[:, -1].sum()}
        if not any(found.values()):
            raise ConfigError("GRAMMAR_BIAS=1: no token of the validation split has a bracket, a quote, a backtick, a "
                              "line break or a list's mark")
        return "grammar: tokens with " + " ".join(f"{name}:{count}" for name, count in found.items())

    def forward(self, hidden: Tensor, tokens: Tensor, context: Context) -> Tensor:
        """Final states (B, T, D) of tokens (B, T) -> (B, T, D)."""
        memory, docs, key = context.memory, context.docs, (-1, "grammar")
        begins = tokens == BOS
        begins = begins if docs is None else begins | F.pad(docs[:, 1:] != docs[:, :-1], (1, 0))
        state = tokens.new_zeros(len(tokens), self.STATE)
        state = state if memory is None else memory.held.get(key, state)
        first = 0 if memory is None else memory.length
        features, state = grammar_features(self.facts[tokens].long(), begins, state, first)
        if memory is not None:
            memory.held[key] = state
        return hidden + F.linear(features.to(hidden.dtype), self.bias.to(hidden.dtype))


# What is added to the final states.
ENDINGS: dict[str, type[nn.Module]] = {"retrieval": Retrieval, "grammar": Grammar}


def token_parts(settings: ModelSettings) -> list[str]:
    """The rows of TOKEN_PARTS that a model has."""
    wanted = {"positions": settings.positions != "none", "bigram": settings.bigram_vocab_size,
              "smear": settings.smear_gate_enabled,
              "blend": settings.smear_channels,
              "values": parse_layers(settings.ve_layers)}
    return [name for name, on in wanted.items() if on]


# ==== 09 MODEL ==============================================================================================
# The order of visits is data: plan_layers turns STACK into steps, and the one forward is a loop over them,
# bound once per plan. Training, scoring and test-time training all call it. No branch here knows a
# system. A parameter's role decides its optimizer and its storage; init_weights is the only place that fills
# parameters.


class Turn(NamedTuple):
    """Where a visit stands in a ( ) group: the group's number, the pass's, and whether it begins or ends it."""
    group: int
    number: int
    first: bool
    last: bool


class Step(NamedTuple):
    """One visit: its number, its block, the earlier visit whose output is skipped in (or None), whether to keep its
    own, whether it has residual lanes, and its turn, where it belongs to a group that has several passes."""
    visit: int
    block: int
    source: int | None
    keep: bool
    lanes: bool
    turn: Turn | None


class Phase(NamedTuple):
    """The steps from a fraction of training on."""
    start: float
    steps: tuple[Step, ...]

    def skips(self) -> list[tuple[int, int]]:
        """(from block, to block) of every skip, in order of use."""
        return [(self.steps[step.source].block, step.block) for step in self.steps if step.source is not None]


def plan_phase(settings: ModelSettings, start: float, most: int = MAX_VISITS, deepest: bool = False,
               passes: int = 0) -> Phase:
    """The visits from a fraction of training on, each group in `most` passes at most, or the `deepest` that training
    can draw, or where it draws them in so many `passes`. Skips pair visit half + j with
    visit half - 1 - j, half being half of those that take part."""
    _, visits = parse_stack(settings.stack)
    blocks, order = plan_blocks(settings), []
    for group, item in enumerate(visits):
        usual = item.most if deepest else max(count for frac, count in item.passes if frac <= start)
        usual = min(passes, item.most) if passes and item.depth else usual
        for number in range(min(most, usual)):
            order += [(block, Turn(group, number, place == 0, place == len(item.blocks) - 1) if item.grouped else None)
                      for place, block in enumerate(item.blocks)]
    part = [visit for visit, (_, turn) in enumerate(order) if settings.loop_skips or turn is None]
    half = len(part) // 2
    sources = {part[half + j]: part[half - 1 - j] for j in range(half)} if settings.unet_skips else {}
    kept = set(sources.values())
    return Phase(start, tuple(Step(visit, block, sources.get(visit), visit in kept, blocks[block].lanes, turn)
                              for visit, (block, turn) in enumerate(order)))


def plan_layers(settings: ModelSettings) -> tuple[Phase, ...]:
    """The phases of a STACK."""
    _, visits = parse_stack(settings.stack)
    return tuple(plan_phase(settings, start) for start in sorted({frac for item in visits for frac, _ in item.passes}))


def _ranges(numbers: list[int]) -> str:
    """0-2,5 for [0, 1, 2, 5]."""
    runs = [list(run) for _, run in itertools.groupby(enumerate(numbers), lambda item: item[1] - item[0])]
    return ",".join(f"{run[0][1]}-{run[-1][1]}" if len(run) > 1 else str(run[0][1]) for run in runs)


def plan_text(settings: ModelSettings) -> str:
    """The plan, one line a phase: blocks in order of their visits, `=` behind those with residual lanes, with `<-b`
    where block b's output is skipped in. Then which blocks have what else."""
    blocks, lines = plan_blocks(settings), []
    for phase in plan_layers(settings):
        cells = [f"{blocks[step.block].letter}{step.block}{'=' * step.lanes}"
                 + (f"<-{phase.steps[step.source].block}" if step.source is not None else "")
                 for step in phase.steps]
        lines.append(f"from {phase.start:.0%}: {len(cells)} visits: {' '.join(cells)}")
    extras = {"exclusive attention": [block.index for block in blocks if block.exclusive],
              f"{settings.attn_gate} gate": [block.index for block in blocks if block.gate],
              "inputs over sqrt(i + 1)": [block.index for block in blocks if settings.ln_scale],
              "value embeddings": [block.index for block in blocks if block.embedded],
              **{f"{count} experts of {expert_width(settings, own)}, {settings.moe_topk} a token, beside "
                 f"{settings.moe_shared * expert_width(settings, own)} for all": [
                     block.index for block in blocks if block.experts == count and block.hidden == own.hidden]
                 for own in blocks if own.hidden and (count := own.experts)},
              f"learn in place, {settings.inplace_chunk} tokens a chunk": [
                  block.index for block in blocks if block.learns],
              "value residual": [block.index for block in blocks if settings.value_residual and block.index]}
    lines += [f"blocks {_ranges(numbers)}: {what}" for what, numbers in extras.items() if numbers]
    between = {f"{settings.loop_state} state": settings.loop_state != "none",
               f"{settings.loop_instructions} instructions": settings.loop_instructions != "none",
               f"tap of {settings.crawler_tap_dim}": settings.crawler_tap_dim,
               f"anchor of {settings.anchor_dim}": settings.anchor_dim,
               "rotary frequencies over " + ", ".join(map(show_value, settings.crawler_loop_rope_scales)):
                   settings.crawler_loop_rope_scales}
    if told := [what for what, on in between.items() if on]:
        lines += [f"blocks {_ranges(list(item.blocks))}, {item.most} passes: {'; '.join(told)}"
                  for item in parse_stack(settings.stack)[1] if item.most > 1]
    lines += [f"blocks {_ranges(list(item.blocks))}: in training {item.depth[0]} to {item.depth[1]} passes a row, on "
              f"average {mean_passes(*item.depth):.2f}" for item in parse_stack(settings.stack)[1] if item.depth]
    return "\n".join(lines)


class BlockModule(nn.Module):
    """Residual mix with the embedding stream, mixer, feed-forward; a gain per channel on each branch. With lanes the
    two run side by side, each on a residual stream of its own, and what they find goes to both."""

    def __init__(self, settings: ModelSettings, plan: BlockPlan, kernels: Picked) -> None:
        super().__init__()
        width, self.eps, self.scale = settings.model_dim, settings.norm_eps, plan.scale
        self.mixer = MIXERS[plan.letter](settings, plan, kernels)
        self.mlp = FEEDS["experts" if plan.experts else "whole"](settings, plan, kernels) if plan.hidden else None
        self.resid_mix = make_parameter((2, width), "gain", "mix")
        self.attn_scale = make_parameter((width,), "gain", 1.0)
        if plan.hidden:
            self.mlp_scale = make_parameter((width,), "gain", 1.0)
        self.post_gain = make_parameter((width,), "gain", 1.0) if settings.post_norm else None
        if plan.lanes:
            # How much of each lane stays, and what attention and feed-forward (rows) give to each lane (columns).
            self.lane_keep = make_parameter((2,), "gain", 1.1)
            self.lane_give = make_parameter((2, 2), "gain", 1.0)
        fit_out(self, settings)
        if plan.hidden and plan.experts:
            spare(self.mlp.routed)  # an expert that no token chose is not lost: balancing brings it some

    def normed(self, x: Tensor) -> Tensor:
        """x (B, T, D) normalised, times the block's own factor."""
        return rms_norm(x, self.eps) * self.scale if self.scale != 1 else rms_norm(x, self.eps)

    def forward(self, x: Tensor, lane: Tensor | None, x0: Tensor, context: Context, sites: Sites,
                deltas: Deltas | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """x, x0 (B, T, D), and the second lane or None -> the same two, and the mixer's values where it has some."""
        mix, taught = self.resid_mix.to(x.dtype), Taught(x0, context.docs, context.visit, context.memory,
                                                           context.live)
        mixed = mix[0] * x + mix[1] * x0
        found, values = self.mixer(self.normed(mixed), context, sites, deltas)
        found = self.attn_scale.to(x.dtype) * found
        if lane is None:
            x = mixed + found
            if self.mlp is not None:
                x = x + self.mlp_scale.to(x.dtype) * self.mlp(self.normed(x), sites, deltas, taught)
            return x if self.post_gain is None else rms_norm(x, self.eps) * self.post_gain.to(x.dtype), None, values
        keep, share = self.lane_keep.to(x.dtype), self.lane_give.to(x.dtype)
        x, other = keep[0] * x + share[0, 0] * found, keep[1] * lane + share[0, 1] * found
        if self.mlp is not None:
            found = self.mlp_scale.to(x.dtype) * self.mlp(self.normed(lane), sites, deltas, taught)
            x, other = x + share[1, 0] * found, other + share[1, 1] * found
        return x, other, values


# What goes on where the lanes of attention and feed-forward end.
FINAL_LANES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mean": lambda attn, mlp: (attn + mlp) / 2, "attn": lambda attn, mlp: attn, "mlp": lambda attn, mlp: mlp}


class Skip(nn.Module):
    """Brings the output of an earlier block in: added with a weight per channel, or mixed through a learned gate."""

    def __init__(self, width: int, gated: bool) -> None:
        super().__init__()
        self.weight = make_parameter((width,), "gain", 1.0)
        self.gate = make_parameter((width,), "gate", 0.0) if gated else None

    def forward(self, x: Tensor, kept: Tensor) -> Tensor:
        """x, kept (B, T, D) -> (B, T, D)."""
        brought = self.weight.to(x.dtype) * kept
        return x + brought if self.gate is None else torch.lerp(brought, x, self.gate.sigmoid().to(x.dtype))


class PassSites(NamedTuple):
    """The site names of one pass of a group."""
    inst_out: str
    anchor_in: str
    anchor_out: str
    begun: str


PACE_START = 0.2119  # exp(-softplus(it)) is the root of a fifth
# What a state that fades at `rate` takes in of what is held for `time`: exactly, or by Euler's step.
HOLDS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "exact": lambda time, rate: -torch.expm1(-time * rate) / rate, "euler": lambda time, rate: time}


def spare(*parts: nn.Module) -> None:
    """Tell Coverage that a few steps may leave these parts without a gradient."""
    for parameter in itertools.chain.from_iterable(part.parameters() for part in parts):
        parameter.rare = True


class Loop(nn.Module):
    """What tells the passes of a ( ) group apart: sums into the stream before each pass. Instructions are a vector
    each, or a low-rank product of the stream as it enters the group (static) or the pass (flow), with an own way out
    for each pass; a tap reads what the blocks before the group made, the same for all passes; an anchor is what earlier
    passes wrote. Each begins at zero, or almost. Sources: clowncar and its successors, PRs 990 and 1140.

    With LOOP_STATE a pass begins with A h + B e, h being what the pass before left (0 at first) and e the normalised
    stream that entered the group: A = exp(-d a) is below 1 whatever is learned, B = (1 - A) / a b holds e for the time
    d exactly, d b is Euler's step. Source: Parcae; there B is a matrix, and h begins with noise."""

    def __init__(self, settings: ModelSettings, passes: int, before: int, name: str) -> None:
        super().__init__()
        width, kind, rank, self.name = settings.model_dim, settings.loop_instructions, settings.inst_dim, name
        product, self.static, self.rank, self.passes = kind in ("static", "flow"), kind == "static", rank, passes
        self.eps, self.taken = settings.norm_eps, HOLDS.get(settings.loop_state)
        if self.taken is not None:
            self.a_log = make_parameter((width,), "gain", 0.0)
            self.pace = make_parameter((width,), "gain", PACE_START)
            self.give = make_parameter((width,), "gain", 1.0)
        self.positions = make_parameter((passes, width), "gate", "position") if kind == "position" else None
        self.inst_in = Linear(width, rank * (passes if self.static else 1), "value") if product else None
        self.inst_out = nn.ModuleList(Linear(rank, width, 0.0) for _ in range(passes if product else 0))
        tap, anchor = settings.crawler_tap_dim, settings.anchor_dim
        self.tap_in = nn.ModuleList(Linear(width, tap, settings.matrix_init) for _ in range(before if tap else 0))
        self.tap_sites = [self.site(f"tap_in.{at}") for at in range(len(self.tap_in))]
        self.tap_out = Linear(tap, width, 0.0) if tap else None
        self.anchor_in = nn.ModuleList(Linear(width, anchor, settings.matrix_init)
                                       for _ in range(passes - 1 if anchor else 0))
        self.anchor_out = nn.ModuleList(Linear(anchor, width, 0.0) for _ in range(passes - 1 if anchor else 0))
        if parse_stack(settings.stack)[1][int(name)].depth:
            spare(self.inst_out, self.anchor_in, self.anchor_out)  # no row may draw so many passes, or learn from them

    def site(self, module: str) -> str:
        """The site of one of its matrices."""
        return f"loops.{self.name}.{module}"

    def sites(self, number: int) -> PassSites:
        """Those of a pass: made when a forward is bound, for a compiled graph makes no names."""
        return PassSites(self.site(f"inst_out.{number}"), self.site(f"anchor_in.{number - 1}"),
                         self.site(f"anchor_out.{number - 1}"), self.site(f"pass.{number}"))

    def hold(self, h: Tensor | None, e: Tensor) -> Tensor:
        """A h + B e, (B, T, D), for the state h, None where it is 0, and what enters e."""
        time, rate = F.softplus(self.pace), self.a_log.exp()
        given = (self.taken(time, rate) * self.give).to(e.dtype) * e
        return given if h is None else (-time * rate).exp().to(h.dtype) * h + given

    def enter(self, x: Tensor, made: list[Tensor], deltas: Deltas | None) -> dict[str, Tensor]:
        """What the passes read of x (B, T, D), which enters the group, and of what the blocks before it made."""
        held = {} if self.taken is None else {"entered": rms_norm(x, self.eps)}
        if self.static:
            held["static"] = self.inst_in(x, self.site("inst_in"), deltas)
        if self.tap_out is not None:
            low = sum(matrix(part, site, deltas)
                      for matrix, part, site in zip(self.tap_in, made, self.tap_sites, strict=True))
            held["tap"] = self.tap_out(low, self.site("tap_out"), deltas)
        return held

    def forward(self, x: Tensor, number: int, sites: PassSites, held: dict[str, Tensor], deltas: Deltas | None
                ) -> Tensor:
        """x (B, T, D) as pass `number` begins with it; `held` is `enter`'s, and the anchor's."""
        told, begun = [], x
        if self.taken is not None:
            x = self.hold(x if number else None, held["entered"])
        if self.positions is not None:
            told.append(self.positions[number].to(x.dtype).expand_as(x))
        if self.inst_in is not None:
            low = held["static"].unflatten(-1, (-1, self.rank))[..., number, :] if self.static else (
                self.inst_in(x, self.site("inst_in"), deltas))
            told.append(self.inst_out[number](low, sites.inst_out, deltas))
        if "tap" in held:
            told.append(held["tap"])
        if self.anchor_out and number:
            written = self.anchor_in[number - 1](x, sites.anchor_in, deltas)
            held["anchor"] = held["anchor"] + written if "anchor" in held else written
            told.append(self.anchor_out[number - 1](held["anchor"], sites.anchor_out, deltas))
        if not told and self.taken is None:
            return x
        return add_delta(x + sum(told), begun, sites.begun, deltas)


# What stands between the passes of a ( ) group.
BETWEEN: dict[str, type[nn.Module]] = {"loop": Loop}


def between(settings: ModelSettings) -> list[str]:
    """The rows of BETWEEN that a model has."""
    return ["loop"] if (settings.loop_state, settings.loop_instructions) != ("none", "none") or (
        settings.crawler_tap_dim or settings.anchor_dim) else []


HEAD_ROWS = 2048
MIXER_FLOOR = 0.05


def mixer_weights(logits: Tensor, seen: Tensor) -> Tensor:
    """Shares (N, 1 + E) of the model and of E orders from a head's logits: a softmax over the model and the orders that
    have `seen` (N, E) their context; the model keeps a floor. Source: clowncar's alpha head."""
    usable = torch.cat([torch.ones_like(seen[:, :1]), seen], 1)
    shares = logits[:, :usable.shape[1]].masked_fill(~usable, -math.inf).softmax(-1) * (1 - MIXER_FLOOR)
    return torch.cat([shares[:, :1] + MIXER_FLOOR, shares[:, 1:]], 1)


def taps_of(phase: Phase, group: int) -> int:
    """How many visits outside of groups stand before this one."""
    return sum(1 for step in itertools.takewhile(lambda step: step.turn is None or step.turn.group != group,
                                                 phase.steps) if step.turn is None)


class GPT(nn.Module):
    """The network's parameters. make_forward binds them to a phase of the plan."""

    def __init__(self, settings: ModelSettings, vocab_size: int, kernels: Picked, dtype: torch.dtype) -> None:
        super().__init__()
        # Outputs of the mixer head: the model, and every order that could be an expert.
        self.mixer_head = make_parameter((MIXER_OUTPUTS, settings.model_dim + 1), "gate", "mixer") if (
            settings.ngram_head) else None
        self.settings, self.dtype, self.mean_nats, self.packed = settings, dtype, kernels.mean_nats, kernels.packed
        self.unrolled = kernels.unrolled
        self.phases = plan_layers(settings)
        width = settings.embed_dim or settings.model_dim
        self.tok_emb = make_parameter((vocab_size, width), "embedding", "normal")
        # A factored embedding has a matrix on the way in and another one on the way out.
        self.embed_proj, self.head_proj = (
            (Linear(width, settings.model_dim, settings.matrix_init), Linear(settings.model_dim, width,
                                                                             settings.matrix_init))
            if settings.embed_dim else (None, None))
        self.logit_bias = make_parameter((vocab_size,), "gain", 0.0) if settings.logit_bias else None
        self.softcaps = make_parameter((2,), "gain", settings.logit_softcap) if settings.asym_logit_rescale else None
        parts = {name: TOKEN_PARTS[name](settings, vocab_size) for name in token_parts(settings)}
        self.positions, self.bigram, self.smear, self.blend, self.values = map(parts.get, (
            "positions", "bigram", "smear", "blend", "values"))
        self.blocks = nn.ModuleList(BlockModule(settings, block, kernels) for block in plan_blocks(settings))
        self.retrieval = ENDINGS["retrieval"](settings, kernels.others["recalled"]) if settings.retrieval_bits else None
        self.grammar = ENDINGS["grammar"](settings, vocab_size) if settings.grammar_bias else None
        pairs = dict.fromkeys(pair for phase in self.phases for pair in phase.skips())
        self.skips = nn.ModuleDict({f"{a}_{b}": Skip(settings.model_dim, settings.skip_gates_enabled)
                                    for a, b in pairs})
        self.loops = nn.ModuleDict({
            str(group): BETWEEN[name](settings, item.most, taps_of(self.phases[-1], group), str(group))
            for name in between(settings) for group, item in enumerate(parse_stack(settings.stack)[1])
            if item.most > 1})

    @property
    def softcap(self) -> Softcap:
        """The bound of the logits: one number, learned ones (2,) above and below 0, or a function that bends."""
        bound = self.settings.logit_softcap if self.softcaps is None else self.softcaps
        return bound if self.settings.softcap_type == "tanh" else functools.partial(bend_poly, softcap=bound)

    def embed(self, tokens: Tensor, deltas: Deltas | None, memory: Memory | None = None) -> Tensor:
        """The stream that enters the first block, (B, T, D), normalised, from tokens (B, T), behind those in the
        memory."""
        if memory is not None and memory.length:
            return self.embed(torch.cat([memory.tail, tokens], 1), deltas)[:, memory.tail.shape[1]:]
        looked_up = F.embedding(tokens, self.tok_emb)
        e = add_delta(looked_up, looked_up, "embed", deltas).to(self.dtype)
        if self.embed_proj is not None:
            e = self.embed_proj(e, "embed_proj", deltas)
        for part in (self.positions, self.bigram, self.smear):
            e = e if part is None else part(e, tokens, deltas)
        e = rms_norm(e, self.settings.norm_eps)
        return e if self.blend is None else self.blend(e, tokens, deltas)

    def remember(self, tokens: Tensor, memory: Memory) -> None:
        """Count tokens (B, T) that were read, and hold the last ones; where tokens are told their place, from a place
        on that counts as the first."""
        whole = tokens if memory.tail is None else torch.cat([memory.tail, tokens], 1)
        begins, memory.length = memory.length + tokens.shape[1] - whole.shape[1], memory.length + tokens.shape[1]
        first = max(0, memory.length - NEAR_TOKENS)
        first -= first % self.positions.rows if self.positions is not None else 0
        memory.tail = whole[:, max(0, first - begins):]

    def head_input(self, hidden: Tensor, deltas: Deltas | None = None) -> Tensor:
        """What is multiplied by the embedding: hidden (..., D), or its projection where the embedding is factored."""
        return hidden if self.head_proj is None else self.head_proj(hidden, "head_proj", deltas)

    def logits(self, hidden: Tensor, deltas: Deltas | None = None) -> Tensor:
        """fp32 logits (B, T, V) of hidden (B, T, D); the head is the site `head`, added before the soft-cap."""
        hidden = self.head_input(hidden, deltas)
        if self.logit_bias is None and (deltas is None or "head" not in deltas):
            return soft_logits(hidden, self.tok_emb, self.softcap)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        raw = add_delta(soft_logits(hidden, self.tok_emb, 0.0), hidden.to(wide), "head", deltas)
        return bend(raw if self.logit_bias is None else raw + self.logit_bias.to(wide), self.softcap)

    def mixer_logits(self, hidden: Tensor) -> Tensor:
        """The mixer head's logits (N, outputs), fp32, of hidden (N, D)."""
        return F.linear(hidden.float(), self.mixer_head[:, :-1], self.mixer_head[:, -1])


class Leaving(NamedTuple):
    """Which positions (B, T, 1) have left a group, and the stream (B, T, D) after its last pass."""
    gone: Tensor
    before: Tensor

    def after(self, x: Tensor, share: float) -> "Leaving":
        """The same a pass later, which made x: who has left stays as it was, and who changes by less than `share` of
        its norm leaves."""
        change = (x - self.before).float().norm(dim=-1, keepdim=True)
        small = change < share * self.before.float().norm(dim=-1, keepdim=True)
        return Leaving(self.gone | small, torch.where(self.gone, self.before, x))


def make_forward(model: GPT, phase: "int | Phase", leave: float = 0.0, again: bool = False) -> Callable[..., Tensor]:
    """forward(tokens (B, T), docs, deltas) -> final normalised hidden states (B, T, D), for one phase or the number of
    one. docs: document numbers (B, T), spans, or None where every row is one document. keep (N,), or (N, B) for each
    row: which passes of ( ) groups take part, 1 or 0 by the number of their first visit, 2 where what came before them
    gets no gradient through them; None is all. A position leaves a group when a pass changes it by less than the share
    `leave`: it stays as it is, and is read so. Blocks are computed `again` on the way back instead of kept. With a
    memory the tokens go on the document that it holds, docs being None, and are added to it.

    Everything that depends on the plan is resolved here, so that the function compiles to one graph.
    """
    settings, bound, merge = model.settings, [], FINAL_LANES[model.settings.parallel_final_lane]
    steps = (phase if isinstance(phase, Phase) else model.phases[phase]).steps
    scales, tapped = settings.crawler_loop_rope_scales, bool(settings.crawler_tap_dim)
    letters = letters_of(settings.stack)
    attends, drawn = "A" in letters, random_depth(settings.stack)
    recurrent = bool(letters - {"A"} or settings.inplace_layers or settings.retrieval_bits or
                     settings.grammar_bias)
    for step in steps:
        sites = Sites(*(f"v{step.visit}.{part}" for part in Sites._fields))
        skip = None if step.source is None else model.skips[f"{steps[step.source].block}_{step.block}"]
        loop = model.loops[str(step.turn.group)] if step.turn and step.turn.first and (
            str(step.turn.group) in model.loops) else None
        told = None if loop is None else loop.sites(step.turn.number)
        stretch = scales[min(step.turn.number, len(scales) - 1)] if step.turn and scales else 1.0
        block = model.blocks[step.block]
        block = functools.partial(checkpoint, block, use_reentrant=False, preserve_rng_state=False) if again else block
        bound.append((step, block, skip, loop, told, stretch, sites))

    def forward(tokens: Tensor, docs: "Tensor | Spans | None", deltas: Deltas | None = None,
                keep: Tensor | None = None, memory: Memory | None = None) -> Tensor:
        packed = model.packed and isinstance(docs, Spans)
        numbers = docs if docs is None or packed and not recurrent else _numbers(docs, tokens.shape)
        mask = docs if packed else attention_mask(numbers, tokens.shape) if attends else None
        x = model.embed(tokens, deltas, memory)  # (B, T, D)
        embedded = None if model.values is None else model.values(tokens, model.dtype, deltas)
        context, x0, lane = Context(mask, numbers, embedded, None, memory=memory), x, None
        kept, made, held = {}, [], {}
        left: Leaving | None = None
        for step, block, skip, loop, told, stretch, sites in bound:
            if step.lanes and lane is None:
                lane = x
            elif lane is not None and not step.lanes:
                x, lane = merge(x, lane), None
            if skip is not None:
                x = skip(x, kept.pop(step.source))
            if keep is not None and step.turn and step.turn.first:
                share = keep[step.visit] if keep.ndim == 1 else keep[step.visit][:, None, None]
                x = torch.where(share > 1, x.detach(), x) if drawn else x
                entered = x, share.clamp_max(1).to(x.dtype)
            if keep is not None:
                context = context._replace(live=entered[1] if step.turn else None)
            if loop is not None:
                held = held if step.turn.number else loop.enter(x, made, deltas)
                x = loop(x, step.turn.number, told, held, deltas)
            x, lane, values = block(x, lane, x0, context._replace(stretch=stretch, visit=step.visit), sites, deltas)
            if settings.value_residual and context.first is None:
                context = context._replace(first=values)
            if keep is not None and step.turn and step.turn.last:
                x = torch.lerp(entered[0], x, entered[1])
            if leave and step.turn and step.turn.last:
                left = left.after(x, leave) if step.turn.number else Leaving(torch.zeros_like(x[..., :1]).bool(), x)
                x = left.before
            if step.keep:
                kept[step.visit] = x
            if tapped and step.turn is None:
                made.append(x)
        x = rms_norm(x if lane is None else merge(x, lane), settings.norm_eps)
        if model.retrieval is not None:
            x = model.retrieval(x, x0, context, deltas)
        if model.grammar is not None:
            x = model.grammar(x, tokens, context)
        if memory is not None:
            model.remember(tokens, memory)
        return x

    return forward


class SiteProbe(dict):
    """Deltas that add nothing anywhere and note the widths of every site they are asked for: site -> (in, out)."""

    def __contains__(self, site: object) -> bool:
        return True

    def __getitem__(self, site: str) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda y, x: self.setdefault(site, (x.shape[-1], y.shape[-1])) and y


def site_shapes(model: GPT, phase: "int | Phase") -> dict[str, tuple[int, int]]:
    """(in, out) of every named site of one phase, in the order of the forward, the head last."""
    probe, tokens = SiteProbe(), torch.zeros(1, 2, dtype=torch.long, device=model.tok_emb.device)
    with torch.no_grad():
        model.logits(make_forward(model, phase)(tokens, None, probe), probe)
    return dict(probe.items())


def make_loss(model: GPT, phase: "int | Phase", head_loss: float = 0.0, z_loss: float = 0.0, again: bool = False
              ) -> Callable[..., Tensor]:
    """loss(tokens, targets, docs, lessons, keep) -> mean nats of a batch, a scalar, for one phase of the plan. Lessons
    weigh the targets, and teach the mixer head which expert to trust, beside the model's chances as they are; z_loss
    weighs the mean squared log-sum of the logits (source: PaLM); blocks are computed `again` on the way back."""
    forward, plain = make_forward(model, phase, again=again), plain_head(model.settings) and not z_loss

    def loss(tokens: Tensor, targets: Tensor, docs: "Tensor | Spans | None", lessons: Lessons | None = None,
             keep: Tensor | None = None) -> Tensor:
        hidden = forward(tokens, docs, None, keep)
        if lessons is None and plain:
            return model.mean_nats(model.head_input(hidden.flatten(0, 1)), model.tok_emb, targets.flatten(),
                                   model.softcap)
        flat = hidden.flatten(0, 1)
        logits = model.logits(flat)
        losses = F.cross_entropy(logits, targets.flatten(), reduction="none")
        total = losses.mean() if lessons is None else (losses * lessons.weights).mean()
        if z_loss:
            total = total + z_loss * logits.logsumexp(-1).square().mean()
        if lessons is not None and model.mixer_head is not None:
            shares = mixer_weights(model.mixer_logits(flat), lessons.seen)
            chances = torch.cat([(-losses.detach()).exp()[:, None], lessons.chances], 1)
            total = total - head_loss * (shares * chances).sum(1).log().mean()
        return total

    return loss


# Deviations of what starts normally distributed; 0 is TIED_EMBED_INIT_STD.
NORMAL_STARTS = {"normal": 0.0, "faint": 0.005, "value": 0.01, "gaussian": 0.02}
LEAST_PACE, MOST_PACE = 0.001, 0.1


def _start_decay(fresh: Tensor, generator: torch.Generator) -> None:
    """Logarithms of rates uniform in [1, 16]."""
    fresh.uniform_(1, 16, generator=generator).log_()


def _start_pace(fresh: Tensor, generator: torch.Generator) -> None:
    """What softplus makes log-uniform in [LEAST_PACE, MOST_PACE]."""
    pace = fresh.uniform_(math.log(LEAST_PACE), math.log(MOST_PACE), generator=generator).exp_()
    fresh.copy_(pace + torch.log(-torch.expm1(-pace)))


def _start_position(fresh: Tensor, generator: torch.Generator) -> None:
    """Orthonormal rows times 0.01."""
    nn.init.orthogonal_(fresh, 0.01, generator=generator)


# Starts of recurrent mixers and of loops.
STARTS: dict[str, Callable[[Tensor, torch.Generator], None]] = {
    "decay": _start_decay, "pace": _start_pace, "position": _start_position,
    "forget": lambda fresh, generator: fresh.copy_(torch.linspace(3, 6, len(fresh)))}


def init_weights(model: GPT, seed: int) -> None:
    """Fill every parameter from its start; each has a random stream of its own, the same on every device."""
    for name, parameter in model.named_parameters():
        generator = torch.Generator().manual_seed(stream_seed(seed, f"init {name}"))
        fresh = torch.empty(parameter.shape, dtype=torch.float32)
        start = parameter.start
        if start in NORMAL_STARTS:
            fresh.normal_(std=NORMAL_STARTS[start] or model.settings.tied_embed_init_std, generator=generator)
        elif start in STARTS:
            STARTS[start](fresh, generator)
        elif start == "uniform":
            bound = parameter.shape[-1] ** -0.5
            fresh.uniform_(-bound, bound, generator=generator)
        elif start == "orthogonal":
            nn.init.orthogonal_(fresh, generator=generator)
        elif start == "mix":
            fresh[0], fresh[1] = 1.0, 0.0
        elif start == "mixer":
            fresh.zero_()[0, -1] = 2.0
        else:
            fresh.fill_(start)
        with torch.no_grad():
            parameter.copy_(fresh)


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], what: str, check_only: bool = False) -> None:
    """Copy weights into the model, strictly: ConfigError naming tensors that are missing, extra or of another shape.
    `check_only` compares and copies nothing."""
    own = dict(model.named_parameters())
    faults = [f"{name} is missing" for name in own if name not in weights]
    faults += [f"{name} is not in the model" for name in weights if name not in own]
    faults += [f"{name} is {tuple(weights[name].shape)}, must be {tuple(own[name].shape)}" for name in own
               if name in weights and weights[name].shape != own[name].shape]
    if faults:
        raise ConfigError(f"{what}: does not fit the model: {'; '.join(faults[:5])}")
    with torch.no_grad():
        for name, parameter in () if check_only else own.items():
            parameter.copy_(weights[name])


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """sha256 over names and fp32 bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode() + weights[name].detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def count_roles(model: nn.Module) -> dict[str, int]:
    """Parameters by role."""
    counts: dict[str, int] = {}
    for parameter in model.parameters():
        counts[parameter.role] = counts.get(parameter.role, 0) + parameter.numel()
    return counts


def mixer_flops(settings: ModelSettings, block: BlockPlan, length: int) -> float:
    """FLOPs of one token in one mixer: its matrices, and attention over the mean context or a chunked recurrence."""
    width, heads, key, value, size = settings.model_dim, block.heads, block.key, block.value, settings.mixer_chunk
    attention = 4 * width * length / 2
    if block.letter == "A":
        gate = block.heads * (width if block.gate.dense else settings.gate_window) if block.gate else 0
        return 2 * (2 * width * width + 2 * width * width * block.kv_heads / heads + gate) + attention
    matrices = 2 * width * heads * (2 * key + (2 + block.gated) * value)
    # Within a chunk: two products of keys, the solve, one sum; with the state: read twice, written once.
    total = matrices + 2 * heads * (size * (2.5 * key + 1.5 * value) + 3 * key * value)
    if block.letter == "K":
        total += 2 * settings.knot_bits * (2 * heads * value + width)
    if block.letter == "T" and settings.titans_depth == 2:
        total += 2 * heads * 2 * key * (4 * (key + value) + 2 * size)
    if block.letter == "T" and settings.titans_context:
        # Keys and values of what is recalled, and attention over it, over the slots and over the tokens.
        total += 2 * width * heads * (key + value) + 2 * attention + 4 * width * settings.persistent_slots
    return total


def path_flops(settings: ModelSettings, block: BlockPlan) -> float:
    """FLOPs of one token in the low-rank paths of a block: two a rank for every input and output of its matrices."""
    width, heads = settings.model_dim, block.heads
    ends = (width * (6 + 2 * block.kv_heads / heads) if block.letter == "A" else
            2 * (width + heads * block.key) + (2 + block.gated) * (width + heads * block.value))
    ends += 3 * settings.knot_bits + 2 * heads * block.value + width if block.letter == "K" else 0
    return 2 * settings.hgf_rank * (ends + 2 * (width + active_width(settings, block)) * bool(block.hidden))


def forward_flops(settings: ModelSettings, vocab_size: int, phase: Phase, length: int) -> int:
    """FLOPs of one token's forward: two a weight of every matrix and visit, attention over the mean context, head."""
    blocks, width = plan_blocks(settings), settings.model_dim
    total = 2 * vocab_size * (settings.embed_dim or width) + 4 * width * settings.embed_dim
    total += 2 * width * settings.bigram_dim * bool(settings.bigram_vocab_size)
    total += 2 * settings.retrieval_bits * (width + length / 2)
    total += 2 * width * ENDINGS["grammar"].FEATURES if settings.grammar_bias else 0
    total += 2 * settings.ve_dim * width * settings.num_kv_heads / settings.num_heads * any(b.embedded for b in blocks)
    for step in phase.steps:
        block = blocks[step.block]
        total += 4 * width * active_width(settings, block) + 2 * width * block.experts
        total += 4 * width * learning_width(settings, block) * block.learns  # one product that writes, one that reads
        total += mixer_flops(settings, block, length) + path_flops(settings, block)
        if step.turn and step.turn.first:
            product = settings.loop_instructions in ("static", "flow")
            total += 4 * width * (settings.inst_dim * product + settings.anchor_dim * (step.turn.number > 0))
            taps = taps_of(phase, step.turn.group) + 1
            total += 2 * width * settings.crawler_tap_dim * taps * (step.turn.number == 0)
    return round(total)


# ==== 10 OPTIMIZERS =========================================================================================
# Update rules are pure functions on tensors; one thin class shares the work over ranks. Schedules are pure
# functions of progress. ROLES says what happens to a parameter: its optimizer, rate and decay. To
# add a kind of parameter: add a row, stamp the role where the parameter is made.


class Role(NamedTuple):
    """How a kind of parameter is trained: a row of UPDATES, or the name of the setting that names it; the names of the
    settings for its rate and its decay. How it is stored is the policy's row of the same name."""
    optimizer: str
    rate: str
    decay: str


ROLES: dict[str, Role] = {
    "matrix": Role("matrix_optimizer", "matrix_lr", "muon_wd"),
    "embedding": Role("other_optimizer", "tied_embed_lr", "embed_wd"),
    "table": Role("other_optimizer", "tied_embed_lr", "embed_wd"),
    "factor": Role("matrix_optimizer", "matrix_lr", "muon_wd"),
    "gain": Role("other_optimizer", "scalar_lr", ""),
    "gate": Role("other_optimizer", "scalar_lr", ""),
    "balance": Role("sign", "moe_gamma", ""),
}


def rule_of(role: str, settings: OptimSettings) -> str:
    """The row of UPDATES of a role."""
    named = ROLES[role].optimizer
    return named if named in UPDATES else getattr(settings, named)


def routes_of(model: nn.Module, settings: ArtifactSettings) -> dict[str, Route]:
    """Parameter -> how it is stored."""
    return {name: pick_route(name, parameter.role, settings) for name, parameter in model.named_parameters()}


def check_roles(model: nn.Module) -> None:
    """Raises, with the names, unless every parameter carries exactly one known role."""
    lost = [name for name, parameter in model.named_parameters() if getattr(parameter, "role", None) not in ROLES]
    if lost:
        raise CheckError(f"parameters without a role of {', '.join(ROLES)}: {', '.join(lost)}")


# (a, b, c) of X <- aX + (bA + cA^2)X with A = XX^T, one row an iteration; the last row is repeated.
# Sources: Keller Jordan's Muon; Polar Express (Amsel et al. 2025), constants as in PR 1787 of the challenge.
MUON_BACKENDS: dict[str, tuple[tuple[float, float, float], ...]] = {
    "newton_schulz": ((3.4445, -4.775, 2.0315),),
    "polar_express": ((8.156554524902461, -22.48329292557795, 15.878769915207462),
                      (4.042929935166739, -2.808917465908714, 0.5000178451051316),
                      (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
                      (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
                      (2.3465413258596377, -1.7097828382687081, 0.42323551169305323)),
}


def orthogonalize(update: Tensor, backend: str, steps: int, dtype: torch.dtype) -> Tensor:
    """Matrices (N, R, C) with their singular values pushed towards 1; products and result in `dtype`."""
    rows = MUON_BACKENDS[backend]
    x = update.mT if update.shape[-2] > update.shape[-1] else update
    x = (x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)).to(dtype)
    for index in range(steps):
        a, b, c = rows[min(index, len(rows) - 1)]
        gram = x @ x.mT  # (N, R, R)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if update.shape[-2] > update.shape[-1] else x


def muon_direction(grads: Tensor, momenta: Tensor, momentum: float, settings: OptimSettings, dtype: torch.dtype
                   ) -> Tensor:
    """The orthogonal direction (N, R, C), in `dtype`, of Muon with Nesterov momentum, from gradients and momenta that
    hold them already."""
    update = grads.add(momenta, alpha=momentum)
    if settings.muon_row_normalize:
        update = update / update.norm(dim=-1, keepdim=True).clamp_min(1e-7)
    return orthogonalize(update, settings.muon_backend, settings.muon_backend_steps, dtype)


def muon_scale(shape: torch.Size) -> float:
    """The factor on the direction of a matrix (R, C): the root of R / C where that is more than 1."""
    return max(1.0, shape[-2] / shape[-1]) ** 0.5


def adamw_update_(parameters: list[Tensor], grads: list[Tensor], firsts: list[Tensor], seconds: list[Tensor],
                  step: int, rate: float, decay: float, settings: OptimSettings) -> None:
    """AdamW's step number `step` (from 1) on all tensors, in place. Source: Loshchilov and Hutter 2019."""
    torch._foreach_lerp_(firsts, grads, 1 - settings.beta1)
    torch._foreach_mul_(seconds, settings.beta2)
    torch._foreach_addcmul_(seconds, grads, grads, 1 - settings.beta2)
    roots = torch._foreach_sqrt(seconds)
    torch._foreach_div_(roots, (1 - settings.beta2 ** step) ** 0.5)
    torch._foreach_add_(roots, settings.adam_eps)
    if decay:
        torch._foreach_mul_(parameters, 1 - rate * decay)
    torch._foreach_addcdiv_(parameters, firsts, roots, -rate / (1 - settings.beta1 ** step))


FRO_PACES = (0.1, 0.01, 0.001)


def fro_update_(parameters: list[Tensor], grads: list[Tensor], states: list[dict[str, Tensor]], step: int, rate: float,
                decay: float, settings: OptimSettings) -> None:
    """FRO's step number `step` (from 1) on all tensors, in place, as published: momentum over the root of the mean
    square gradient (of matrices one a row, without the correction of its start), times alpha + (1 - alpha) gamma R. R
    is the resonance of gradient and momentum: over three paces the geometric mean of their cosine's squared mean over
    its mean square. As the momentum holds the gradient already, R is near 1 - (1 - pace)^step whatever the gradients
    are. Source: Radial-BitNet, step 1."""
    for parameter, grad, state in zip(parameters, grads, states, strict=True):
        first, second, cosines = state["first"], state["second"], state["cosines"]
        first.lerp_(grad, 1 - settings.beta1)
        cosine = ((grad * first).sum() / (grad.norm() * first.norm() + settings.adam_eps)).clamp(-1, 1)
        cosines.lerp_(torch.stack((cosine, cosine.square()))[:, None].expand_as(cosines),
                      cosines.new_tensor(FRO_PACES).expand_as(cosines))
        ratios = cosines[0].square() / (cosines[1] + settings.adam_eps)
        resonance = (ratios + settings.adam_eps).log().mean().exp().clamp(0, 1)
        squares = grad.square()
        second.lerp_(squares.mean(1, keepdim=True) if grad.ndim == 2 else squares, 1 - settings.beta2)
        share = (settings.fro_alpha + (1 - settings.fro_alpha) * settings.fro_gamma * resonance) / (
            1 - settings.beta1 ** step)
        parameter.mul_(1 - rate * decay)
        parameter.sub_(rate * share * first / (second.sqrt() + settings.adam_eps))


FRO2_HORIZONS = (5, 50, 500)
FRO2_SKETCH = 4096  # coordinates of a tensor on which its momenta are kept
FRO2_FLOOR = 0.05


def fro2_share(grad: Tensor, state: dict[str, Tensor], step: int, settings: OptimSettings) -> Tensor:
    """FRO-2's factor on a step, a scalar, number `step` from 1: how much a gradient agrees with what came before it.
    For each horizon the momentum is read before the gradient enters it; R is the geometric mean, over horizons that are
    full, of the cosine's signal to noise, at least FRO2_FLOOR; alpha + (1 - alpha) gamma R is divided by its own mean
    so far, so that only the time of a larger step is chosen, not the rate. Ours, after FRO."""
    flat = grad.flatten()
    seen = flat[::-(-flat.numel() // FRO2_SKETCH)]
    slow, cosines = state["slow"], state["cosines"]  # (3, n), (2, 3)
    paces = 1 / slow.new_tensor(FRO2_HORIZONS)
    cosine = (slow @ seen) / (slow.norm(dim=1) * seen.norm() + settings.adam_eps)
    if step > 1:  # before, there is nothing to agree with
        cosines.lerp_(torch.stack((cosine, cosine.square())), paces.expand_as(cosines))
    full = [at for at, horizon in enumerate(FRO2_HORIZONS) if step > horizon]
    resonance = cosine.new_ones(())
    if full:
        whole = 1 - (1 - paces[full]) ** (step - 1)
        ratios = cosines[0, full].square() / (cosines[1, full] * whole + settings.adam_eps)
        resonance = ratios.clamp(FRO2_FLOOR, 1).log().mean().exp()
    slow.lerp_(seen.expand_as(slow), paces[:, None].expand_as(slow))
    share = settings.fro_alpha + (1 - settings.fro_alpha) * settings.fro_gamma * resonance
    state["mean"].lerp_(share, 1 / step)
    return share / state["mean"]


def sgd_step_(parameters: list[Tensor], grads: list[Tensor], states: list[dict[str, Tensor]], step: int, rate: float,
              decay: float, settings: OptimSettings) -> None:
    """A plain step down on all tensors, in place."""
    torch._foreach_mul_(parameters, 1 - rate * decay)
    torch._foreach_add_(parameters, grads, alpha=-rate)


def sign_step_(parameters: list[Tensor], grads: list[Tensor], states: list[dict[str, Tensor]], step: int, rate: float,
               decay: float, settings: OptimSettings) -> None:
    """A step of fixed size down on all tensors, in place."""
    torch._foreach_add_(parameters, torch._foreach_sign(grads), alpha=-rate)


LEAST_LATENT = 0.01  # least scale of a direction, so that groups that begin at zero leave it


def mezo_direction(weight: Tensor, route: Route | None, seed: int) -> Tensor:
    """The direction, shaped as the weight, in which MeZO looks and steps: standard normal and never stored, for the
    same seed is the same direction. Ternary latents (with a route) have it in the scale of their group, LEAST_LATENT at
    least, for what a step of fixed size flips in them would otherwise hang on that."""
    generator = torch.Generator(weight.device).manual_seed(seed)
    direction = torch.randn(weight.shape, generator=generator, device=weight.device)
    if route is None:
        return direction
    groups, base = ternary_base(weight, route)
    scale = base[..., None].expand_as(groups).flatten(1)[:, :weight.shape[1]].to(weight.dtype)
    return direction.mul_(scale.clamp_min(LEAST_LATENT))


# -- what changes the steps of ternary latents


def latent_units(weight: Tensor, route: Route) -> Tensor:
    """A ternary latent (R, C) in units that have the border between 0 and 1 at a half."""
    groups, base = ternary_base(weight, route)
    units = groups / (2 * route.tau * base[..., None]).clamp_min(1e-30)
    return units.flatten(1)[:, :weight.shape[1]].to(weight.dtype)


RUN_RADIUS, ZERO_SHARPNESS = 4, 0.1  # the other trits of five in a byte, on either side


def run_signal(units: Tensor) -> Tensor:
    """How near to zero the neighbours of a weight are, (R, C) in [0, 1]: the mean of a soft indicator of a zero trit
    over RUN_RADIUS on either side in its row, without its own."""
    zero = torch.sigmoid((0.5 - units.abs()) / ZERO_SHARPNESS)
    both = torch.stack((zero, torch.ones_like(zero)), 1).flatten(0, 1)[:, None]  # (2 R, 1, C)
    around = F.avg_pool1d(both, 2 * RUN_RADIUS + 1, 1, RUN_RADIUS) * (2 * RUN_RADIUS + 1) - both
    total, count = around.view(len(units), 2, -1).unbind(1)
    return total / count.clamp_min(1)


def snap_gain(units: Tensor) -> Tensor:
    """Twice the distance to the nearest trit, (R, C): 1 at a border."""
    return (2 * (units - units.round().clamp(-1, 1)).abs()).clamp_max(1)


def cags_published(weight: Tensor, alpha: Tensor) -> Tensor:
    """The published factor on the gradient (R, C): raw weights, whose distance to the nearest of -1, 0, 1 is multiplied
    by the share of nine in a flat row that are below 0.05. Source: JamOne v4.5."""
    near = (weight.abs() < 0.05).to(weight.dtype).flatten()[None, None]
    share = F.avg_pool1d(near, 9, 1, 4).view_as(weight)
    return 1 + alpha * share * (weight - weight.round().clamp(-1, 1)).abs()


def rate_pull(weight: Tensor, units: Tensor, near: Tensor) -> Tensor:
    """What the rate term takes off a weight, (R, C), at strength 1: most at a border, more where neighbours are zero,
    in the latent's own scale."""
    return (0.5 + near) * torch.exp(-((units.abs() - 0.5) / 0.25).square()) * weight / units.abs().clamp_min(1e-12)


def rate_ramp(frac: float) -> float:
    """Share of the rate term and of the placed form by the fraction of training: it rises from 0.3 to 0.65, and ends
    at 0.95."""
    if not 0.3 <= frac < 0.95:
        return 0.0
    return 0.5 * (1 - math.cos(math.pi * min(1.0, (frac - 0.3) / 0.35)))


def alpha_published(alpha: Tensor, mean: Tensor, loss: Tensor) -> None:
    """JamOne's safety rule, in place: alpha falls where the loss is 15 % above its mean, and never rises."""
    mean.copy_(torch.where(mean == 0, loss, mean))
    alpha.copy_(torch.where(loss / mean.clamp_min(1e-6) > 1.15, (alpha / 1.5).clamp_min(0.05), alpha))
    mean.lerp_(loss, 0.05)


def alpha_guarded(alpha: Tensor, mean: Tensor, loss: Tensor) -> None:
    """The guard of the placed form, in place: a factor that falls where the loss is 5 % above its mean, then rises."""
    mean.copy_(torch.where(mean == 0, loss, mean.lerp(loss, 0.02)))
    worse = loss / mean.clamp_min(1e-6) > 1.05
    alpha.copy_(torch.where(worse, (alpha / 1.5).clamp_min(0.05), (1.02 * alpha).clamp_max(1)))


class Steering:
    """What CAGS and the rate term make of the steps of ternary latents, name -> (parameter, route): `before` the update
    and `after` it. The state is alpha, or the guard of the placed form, and the mean of the loss."""

    def __init__(self, settings: OptimSettings, latents: dict[str, tuple[nn.Parameter, Route]]) -> None:
        self.settings, self.latents, self.ramp = settings, latents, 0.0
        self.published = settings.cags == "published"
        self.alpha = settings.cags_alpha if settings.cags != "none" else 0.0
        like = next(parameter for parameter, _ in latents.values()).detach() if latents else torch.zeros(())
        self.state = {"alpha": like.new_tensor(self.alpha if self.published else 1.0), "mean": like.new_zeros(())}
        self.held: list[tuple[nn.Parameter, Tensor, Route]] = []

    def before(self, frac: float, loss: Tensor | None) -> None:
        """Remember the latents that are going to move; the published form changes their gradients."""
        self.ramp = rate_ramp(frac)
        self.held = [(p, p.detach().clone(), route) for p, route in self.latents.values() if p.grad is not None]
        if loss is not None and self.alpha:
            (alpha_published if self.published else alpha_guarded)(*self.state.values(), loss)
        for parameter, old, _ in self.held if self.published and self.alpha else ():
            parameter.grad.mul_(cags_published(old, self.state["alpha"]))

    def after(self, rate: float) -> None:
        """The placed form scales the steps that were made at this rate, the rate term adds its own."""
        for parameter, old, route in self.held if self.ramp else ():
            units = latent_units(old, route)
            near = run_signal(units)
            if self.alpha and not self.published:
                alpha = self.alpha * self.ramp * self.state["alpha"]
                parameter.copy_(old + (parameter - old) * (1 + alpha * near * snap_gain(units)))
            if self.settings.rate_term:
                parameter.sub_(rate * self.settings.rate_term * self.ramp * rate_pull(old, units, near))
        self.held = []


STEERINGS: dict[str, type[Steering]] = {"latents": Steering}


def steering_of(settings: OptimSettings) -> str:
    """The row of STEERINGS that the settings ask for, or nothing."""
    return "latents" if settings.rate_term or settings.cags != "none" and settings.cags_alpha else ""


class Update(NamedTuple):
    """An update rule: what it keeps of a parameter at first, and its step on several, in place: (parameters, gradients,
    states, number of the step, rate, decay, settings). Without a step the directions are Muon's, whose work is divided
    over ranks; `share`, where there is one, is a factor on them."""
    fresh: Callable[[Tensor], dict[str, Tensor]]
    step: Callable[..., None] | None
    share: Callable[[Tensor, dict[str, Tensor], int, OptimSettings], Tensor] | None = None


def adamw_step_(parameters: list[Tensor], grads: list[Tensor], states: list[dict[str, Tensor]], step: int, rate: float,
                decay: float, settings: OptimSettings) -> None:
    """adamw_update_ on states."""
    adamw_update_(parameters, grads, [state["first"] for state in states], [state["second"] for state in states], step,
                  rate, decay, settings)


def _zeros(parameter: Tensor, *kinds: str) -> dict[str, Tensor]:
    return {kind: torch.zeros_like(parameter) for kind in kinds}


UPDATES: dict[str, Update] = {
    "muon": Update(lambda p: _zeros(p, "momentum"), None),
    "fro2": Update(lambda p: {**_zeros(p, "momentum"), "cosines": p.new_zeros(2, 3), "mean": p.new_zeros(()),
                              "slow": p.new_zeros(3, -(-p.numel() // -(-p.numel() // FRO2_SKETCH)))}, None,
                   fro2_share),
    "adamw": Update(lambda p: _zeros(p, "first", "second"), adamw_step_),
    "mezo": Update(lambda p: {}, sgd_step_),
    "sign": Update(lambda p: {}, sign_step_),
    "fro": Update(lambda p: {**_zeros(p, "first"), "cosines": p.new_zeros(2, 3),
                             "second": p.new_zeros(len(p), 1) if p.ndim == 2 else torch.zeros_like(p)}, fro_update_),
}


class Progress(NamedTuple):
    """Where training stands: steps done, fraction done (0..1), steps left at this pace, seconds left of the budget."""
    step: int
    frac: float
    steps_left: float
    seconds_left: float = math.inf


def rate_factor(settings: OptimSettings, progress: Progress) -> float:
    """Share of the full rate: 1, then a straight fall to MIN_LR over the last WARMDOWN_FRAC or WARMDOWN_ITERS."""
    if settings.warmdown_iters:
        height = progress.steps_left / settings.warmdown_iters
    elif settings.warmdown_frac:
        height = (1 - progress.frac) / settings.warmdown_frac
    else:
        height = 1.0
    return max(settings.min_lr, min(1.0, height))


def decay_factor(settings: OptimSettings, frac: float) -> float:
    """Share of the full weight decay: 1, then straight to WD_TAPER_FINAL_MULT at the end."""
    start = settings.wd_taper_start_frac
    return 1 + (settings.wd_taper_final_mult - 1) * (max(0.0, frac - start) / (1 - start) if start < 1 else 0.0)


def momentum_at(settings: OptimSettings, step: int) -> float:
    """Muon's momentum: a straight rise over the warm-up steps."""
    share = min(1.0, step / settings.muon_momentum_warmup_steps) if settings.muon_momentum_warmup_steps else 1.0
    start = settings.muon_momentum_warmup_start
    return start + share * (settings.muon_momentum - start)


def phase_at(phases: tuple[Phase, ...], frac: float) -> int:
    """The phase of the plan that is on at a fraction of training."""
    return max(index for index, phase in enumerate(phases) if phase.start <= frac)


def length_at(settings: TrainSettings, frac: float) -> int:
    """Tokens of a row at a fraction of training."""
    return max((start, length) for start, length in parse_seq_schedule(settings) if start <= frac)[1]


def share_out(costs: Mapping[str, float], size: int) -> dict[str, int]:
    """Name -> rank: dearest first, each to the rank with the least work so far; ties by the name from its end, so that
    like matrices of all blocks are dealt out in turn. The same everywhere."""
    loads, owners = [0.0] * size, {}
    for name in sorted(costs, key=lambda key: (-costs[key], key.split(".")[::-1])):
        owners[name] = loads.index(min(loads))
        loads[owners[name]] += costs[name]
    return owners


class Optimizer:
    """All updates of a step. Momenta are held on every rank; orthogonalisation is divided over ranks by its cost."""

    def __init__(self, model: nn.Module, settings: OptimSettings, world: World, dtype: torch.dtype,
                 routes: Mapping[str, Route] | None = None) -> None:
        check_roles(model)
        self.settings, self.world, self.dtype = settings, world, dtype
        self.parameters = dict(model.named_parameters())
        self.state: dict[str, dict[str, Tensor]] = {}
        self.counts: dict[str, int] = dict.fromkeys(self.parameters, 0)
        self.rules = {name: rule_of(p.role, settings) for name, p in self.parameters.items()}
        for name, parameter in self.parameters.items():
            self.state[name] = UPDATES[self.rules[name]].fresh(parameter.detach())
        matrices = {name: p for name, p in self.parameters.items() if UPDATES[self.rules[name]].step is None}
        self.owners = share_out({name: p.numel() * min(p.shape) for name, p in matrices.items()}, world.size)
        self.latents = {name: route for name, route in (routes or {}).items()
                        if route.format == "ternary" and self.parameters[name].ndim == 2}
        self.steering = STEERINGS[steering_of(settings)](settings, {
            name: (self.parameters[name], route) for name, route in self.latents.items()}) if steering_of(
                settings) else None
        if self.steering is not None:
            self.state["steering"] = self.steering.state

    @torch.no_grad()
    def step(self, factor: float, momentum: float, decay_share: float = 1.0, frac: float = 0.0,
             loss: Tensor | None = None) -> None:
        """Update every parameter that has a gradient; the rates are the settings' times `factor`, the decays times
        `decay_share`. While the ranks exchange directions of matrices, everything else is updated. `frac` of training
        and `loss` of the step rule what is done to ternary latents."""
        present = {name: p for name, p in self.parameters.items() if p.grad is not None}
        if self.steering is not None:
            self.steering.before(frac, loss)
        matrices = {name: p for name, p in present.items() if name in self.owners}
        banks = self._begin_directions(matrices, momentum) if matrices else []
        together: dict[tuple[str, int], list[str]] = {}
        for name, parameter in present.items():
            self.counts[name] += 1
            if name not in self.owners:
                together.setdefault((parameter.role, self.counts[name]), []).append(name)
        for (role, count), names in together.items():
            rate, decay = self._rates(role, factor, decay_share)
            chosen = [present[name] for name in names]
            UPDATES[self.rules[names[0]]].step(chosen, [parameter.grad for parameter in chosen],
                                               [self.state[name] for name in names], count, rate, decay, self.settings)
        rate, decay = self._rates("matrix", factor, decay_share)
        for names, directions, wait in banks:
            shares = [self._share(name, present[name].grad) for name in names]
            wait()
            chosen = [present[name] for name in names]
            torch._foreach_mul_(chosen, 1 - rate * decay)
            torch._foreach_add_(chosen, [part.float() if share is None else part.float() * share
                                         for part, share in zip(directions, shares, strict=True)],
                                alpha=-rate * muon_scale(chosen[0].shape))
        if self.steering is not None:
            self.steering.after(rate)

    def _rates(self, role: str, factor: float, decay_share: float) -> tuple[float, float]:
        """Rate and decay of a role at this step."""
        row = ROLES[role]
        return (factor * getattr(self.settings, row.rate),
                decay_share * getattr(self.settings, row.decay) if row.decay else 0.0)

    def _share(self, name: str, grad: Tensor) -> Tensor | None:
        """The factor on a direction, where its rule has one."""
        share = UPDATES[self.rules[name]].share
        return None if share is None else share(grad, self.state[name], self.counts[name], self.settings)

    def _begin_directions(self, present: dict[str, nn.Parameter], momentum: float
                          ) -> list[tuple[list[str], list[Tensor], Callable[[], object]]]:
        """Momenta moved; then per shape, dearest first, the names, their directions, and what to call before they are
        read. Every rank computes those of the matrices it owns, batched, and they travel while the next are made."""
        momenta = [self.state[name]["momentum"] for name in present]
        torch._foreach_mul_(momenta, momentum)
        torch._foreach_add_(momenta, [p.grad for p in present.values()])
        shapes: dict[torch.Size, list[str]] = {}
        for name, parameter in present.items():
            shapes.setdefault(parameter.shape, []).append(name)
        banks = []
        for shape, names in sorted(shapes.items(), key=lambda item: -len(item[1]) * item[0].numel() * min(item[0])):
            by_rank = [[name for name in names if self.owners[name] == rank] for rank in range(self.world.size)]
            mine, slots = by_rank[self.world.rank], max(map(len, by_rank))
            bank = torch.zeros(slots, *shape, dtype=self.dtype, device=present[names[0]].device)
            if mine:
                bank[:len(mine)] = muon_direction(
                    torch.stack([present[name].grad for name in mine]),
                    torch.stack([self.state[name]["momentum"] for name in mine]), momentum, self.settings, self.dtype)
            whole, wait = self.world.begin_collect(bank)
            order = [name for own in by_rank for name in own]
            places = [rank * slots + place for rank, own in enumerate(by_rank) for place in range(len(own))]
            banks.append((order, [whole[place] for place in places], wait))
        return banks


class Average:
    """Exponential moving average of all parameters, in fp32. With decay 0 it is the parameters themselves."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.live = decay, dict(model.named_parameters())
        self.shadow = {name: p.detach().clone() for name, p in self.live.items()} if decay else {}

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the parameters by 1 - decay."""
        if self.decay:
            torch._foreach_lerp_(list(self.shadow.values()), list(self.live.values()), 1 - self.decay)

    def weights(self) -> dict[str, Tensor]:
        """What is exported: name -> fp32 tensor."""
        return self.shadow if self.decay else {name: p.detach() for name, p in self.live.items()}


# ==== 11 TRAINING ===========================================================================================
# Fill the clock with good steps and lose none of them. The global batch is cut into the same micro-batches
# whatever the number of ranks; the stop, the rate and the phase follow rank 0's clock on all ranks; a
# checkpoint is whole or absent.


class Stopwatch:
    """Seconds of training: those of earlier processes of this run, plus the running ones; validation is not counted."""

    def __init__(self, clock: Callable[[], float], spent: float) -> None:
        self.clock, self.spent, self.since = clock, spent, None

    def start(self) -> None:
        """Go on counting."""
        self.since = self.clock()

    def stop(self) -> None:
        """Pause."""
        self.spent, self.since = self.seconds(), None

    def seconds(self) -> float:
        """Seconds so far."""
        return self.spent + (0.0 if self.since is None else self.clock() - self.since)


def working_compiler() -> str | None:
    """The C++ compiler torch.compile would use on a CPU, if it compiles a line against Python's headers."""
    found = shutil.which("g++") or shutil.which("clang++")
    if found is None:
        return None
    program = "#include <Python.h>\n#include <vector>\nint main() { std::vector<int> v; return (int)v.size(); }\n"
    done = subprocess.run([found, "-x", "c++", "-fsyntax-only", f"-I{sysconfig.get_paths()['include']}", "-"],
                          input=program, text=True, capture_output=True)
    return found if done.returncode == 0 else None


def pick_compile(choice: str, device: torch.device) -> tuple[bool, str]:
    """Whether to compile, and the reason to print. On a CPU only when told to: a cold graph costs 20 to 45 s there, and
    lanes train as many tokens a second as the compiled step did (records/LOG.md), so no budget repays it."""
    if choice == "0":
        return False, "COMPILE=0"
    if device.type == "cuda":
        lacking = triton_lacks()
        if lacking and choice == "1":
            raise ConfigError(f"COMPILE=1: on a GPU needs {' and '.join(lacking)}, not found")
        return not lacking, f"a GPU without {' and '.join(lacking)}" if lacking else "a GPU"
    if choice == "auto":
        return False, "lanes are as fast on a CPU and start at once; COMPILE=1 insists"
    compiler = working_compiler()
    if compiler is None:
        raise ConfigError("COMPILE=1: needs a working C++ compiler (g++ or clang++) and Python's headers, none found")
    return True, compiler


MAX_GRAPHS = 64


def make_compiled(function: Callable[..., Tensor], on: bool, dynamic: bool = False, replayed: bool = False
                  ) -> Callable[..., Tensor]:
    """The function through torch.compile as one graph, for one shape or for any, or as it is; `replayed` as a CUDA
    graph. The only caller of torch.compile."""
    if on:
        # Plans times contexts, which share their code, may be more than torch's limit of graphs for one code.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MAX_GRAPHS)
    return torch.compile(function, fullgraph=True, dynamic=dynamic,
                         mode="reduce-overhead" if replayed else None) if on else function


def compiled_graphs() -> int:
    """Graphs that torch.compile has made so far in this process."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


class Prefetch:
    """Micro-batches made in the background while the device works on earlier ones. What was made for a context that
    has changed since is cut anew from the same tokens; nothing is skipped."""

    AHEAD = 2

    def __init__(self, batches: Batches, world: World) -> None:
        self.batches, self.world = batches, world
        on_gpu = world.device.type == "cuda"
        self.worker = ThreadPoolExecutor(1, initializer=torch.cuda.set_device if on_gpu else None,
                                         initargs=(world.device,) if on_gpu else ())
        self.coming: dict[tuple[int, int], Any] = {}

    def take(self, index: int, length: int, following: Iterable[int]) -> Batch:
        """Micro-batch `index`; the next ones of `following` are begun."""
        ready = self.coming.pop((index, length), None)
        if ready is None:
            self.coming = {key: coming for key, coming in self.coming.items() if key[1] == length}
            ready = self.worker.submit(self.batches.micro, index, self.world, length)
        for later in itertools.islice(following, self.AHEAD):
            if (later, length) not in self.coming:
                self.coming[later, length] = self.worker.submit(self.batches.micro, later, self.world, length)
        return ready.result()


class LossScale:
    """The factor on a float16 loss that keeps its gradients representable: halved where one is not finite and that
    step is left out, doubled after so many good ones. With other dtypes it is 1 and nothing is left out. Source:
    Micikevicius and others 2018."""

    GROWTH_STEPS = 2000

    def __init__(self, dtype: torch.dtype) -> None:
        self.value, self.good, self.on = (2.0 ** 15 if dtype == torch.float16 else 1.0), 0, dtype == torch.float16

    def saw(self, finite: bool) -> bool:
        """After a step's gradients: whether to use them."""
        if not self.on:
            return True
        self.good = self.good + 1 if finite else 0
        if not finite:
            self.value /= 2
        elif self.good % self.GROWTH_STEPS == 0:
            self.value *= 2
        return finite or self.value < 1


class Checkpoint(NamedTuple):
    """What a killed run continues from."""
    step: int
    seconds: float
    finished: bool
    last_loss: float
    config_hash: str
    data_hash: str
    weights: dict[str, Tensor]
    average: dict[str, Tensor]
    state: dict[str, dict[str, Tensor]]
    counts: dict[str, int]
    pace: dict[str, float]  # context and the step at which it began, loss scale, clocks, whether rows are packed


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write it atomically, in torch's zip format (every record has a CRC)."""
    buffer = io.BytesIO()
    torch.save(checkpoint._asdict(), buffer)
    write_atomic(path, buffer.getvalue())


def load_tensors(path: Path, device: torch.device | str, cure: str) -> dict[str, Any]:
    """What torch.save wrote at `path`; ConfigError with the cure when it is damaged. Never executes what it reads."""
    try:
        with zipfile.ZipFile(path) as archive:
            if broken := archive.testzip():
                raise ValueError(f"checksum of {broken}")
        return torch.load(path, map_location=device, weights_only=True)
    except (OSError, RuntimeError, zipfile.BadZipFile, zlib.error, TypeError, ValueError, KeyError, EOFError,
            NotImplementedError, pickle.UnpicklingError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"RUN_ID={path.parent.name}: {path} is damaged ({first}); {cure}") from None


def load_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint at `path`; ConfigError when it is damaged."""
    cure = "delete it to train again"
    try:
        return Checkpoint(**load_tensors(path, "cpu", cure))
    except TypeError as error:
        raise ConfigError(f"RUN_ID={path.parent.name}: {path} is damaged ({error}); {cure}") from None


def check_same_weights(model: nn.Module, world: World) -> None:
    """CheckError unless all ranks hold bit-identical parameters."""
    if world.size == 1:
        return
    digest = hashlib.sha256()
    for parameter in model.parameters():
        digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy())
    if len(set(world.gather(digest.hexdigest()))) > 1:
        raise CheckError("ranks hold different weights: the run is not reproducible and was stopped")


def qat_parts(model: GPT, settings: ArtifactSettings) -> list[str]:
    """The parameters that QAT_START concerns: all, or those of blocks in ( ) groups."""
    looped = tuple(f"blocks.{step.block}." for step in model.phases[-1].steps if step.turn)
    return [name for name, _ in model.named_parameters() if settings.qat_parts == "all" or name.startswith(looped)]


@torch.no_grad()
def store_weights(model: nn.Module, routes: Mapping[str, Route]) -> None:
    """Replace the named parameters by what their routes make of them."""
    for name, parameter in model.named_parameters():
        if name in routes:
            parameter.copy_(project(parameter, routes[name]))


@torch.no_grad()
def shake_weights(model: nn.Module, routes: Mapping[str, Route], seed: int) -> None:
    """Add uniform noise of one step of its grid to every named parameter that has one."""
    for name, parameter in model.named_parameters():
        form = FORMATS[routes[name].format] if name in routes else None
        if form is None or form.measure is None:
            continue
        rows, generator = as_rows(parameter.detach()), torch.Generator(parameter.device)
        generator.manual_seed(stream_seed(seed, name))
        step = make_grid(form.measure(rows, routes[name], form.bits), routes[name], rows.shape[1], form.low,
                         form.high).step
        noise = torch.empty_like(rows).uniform_(-0.5, 0.5, generator=generator) * step
        parameter.add_(noise.view_as(parameter))


def drawn_passes(settings: ModelSettings, plan: Phase, rows: int, seed: int | None) -> np.ndarray:
    """Which passes take part in each of `rows` rows, float32 (N, rows) as the forward's keep: a row's number of them is
    Poisson's, within the group's bounds, and the last half of the mean get gradients. Without a seed all take part and
    the gradient goes through all. Source: Parcae, the definition by sequence."""
    keep = np.ones((len(plan.steps), rows), np.float32)
    if seed is None:
        return keep
    visits, rng = parse_stack(settings.stack)[1], np.random.Generator(np.random.PCG64(seed))
    for group, item in enumerate(visits):
        if item.depth is None:
            continue
        least, most, mean = item.depth
        count = np.clip(rng.poisson(mean, rows), least, most)
        cut = count - np.minimum(count, math.ceil(mean / 2))
        for step in plan.steps:
            if step.turn and step.turn.group == group and step.turn.first:
                number = step.turn.number
                keep[step.visit] = np.where(number >= count, 0, np.where((0 < number) & (number <= cut), 2, 1))
    return keep


def dropped_parts(settings: ModelSettings) -> tuple[str, ...]:
    """How the names of parameters begin that PASS_DROP can leave without a gradient."""
    return ("loops.", *(f"blocks.{block}." for item in parse_stack(settings.stack)[1] if item.most > 1
                        for block in item.blocks))


class Coverage:
    """Proves that training reaches every parameter: in the graph of some phase, and moved within five steps of it."""

    STEPS = 5

    def __init__(self, model: nn.Module, dropped: tuple[str, ...] = ()) -> None:
        """Parameters marked by `spare`, and those whose names begin as in `dropped`, need only be in a graph."""
        self.parameters = dict(model.named_parameters())
        self.outside = set(self.parameters)
        self.still = {name: 0 for name, parameter in self.parameters.items()
                      if not hasattr(parameter, "rare") and not name.startswith(dropped)}

    def saw_phase(self) -> None:
        """After a warm-up backward: parameters with a gradient are in the graph of this phase."""
        self.outside -= {name for name, parameter in self.parameters.items() if parameter.grad is not None}

    def check_phases(self) -> None:
        """CheckError naming the parameters that no phase reaches."""
        if self.outside:
            raise CheckError(f"parameters that no phase of the plan trains: {', '.join(sorted(self.outside))}")

    def saw_step(self) -> None:
        """After a real backward: CheckError naming parameters whose gradient stayed exactly zero."""
        for name in list(self.still):
            gradient = self.parameters[name].grad
            if gradient is None:
                continue
            if bool(gradient.any()):
                del self.still[name]
                continue
            self.still[name] += 1
            if self.still[name] >= self.STEPS:
                raise CheckError(f"parameter {name}: its gradient was exactly zero in its first {self.STEPS} steps")


REFERENCE_MARKS, REFERENCE_SHARE = (0.25, 0.5, 0.75), 0.05


def reference_losses(folder: str) -> list[tuple[float, float]]:
    """(fraction of training, mean training loss over the REFERENCE_SHARE before it) of a finished run at each mark;
    ConfigError where its events do not say."""
    found: dict[int, tuple[float, float]] = {}
    try:
        lines = (Path(folder) / "events.jsonl").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise ConfigError(f"REFERENCE_RUN={folder}: must be a run folder with events.jsonl "
                          f"({error.strerror})") from None
    for line in lines:
        try:
            event = json.loads(line)
            if event["event"] in ("start", "resume"):  # what came after the checkpoint, or all, never happened
                found = {step: pair for step, pair in found.items() if step <= event.get("step", 0)}
            elif event["event"] == "step":
                found[event["step"]] = float(event["frac"]), float(event["train_loss"])
        except (ValueError, KeyError, TypeError, AttributeError):
            continue  # a line that a kill cut short, or none of a training
    means = [(mark, mean_loss(found.values(), mark)) for mark in REFERENCE_MARKS]
    if any(map(math.isnan, dict(means).values())):
        raise ConfigError(f"REFERENCE_RUN={folder}: its events.jsonl has no steps around "
                          f"{', '.join(f'{mark:.0%}' for mark, loss in means if math.isnan(loss))} of training")
    return means


def mean_loss(losses: Iterable[tuple[float, float]], mark: float) -> float:
    """Mean over the REFERENCE_SHARE of training before a mark, from (fraction, loss) of steps; NaN without any."""
    near = [loss for frac, loss in losses if mark - REFERENCE_SHARE <= frac < mark]
    return statistics.fmean(near) if near else math.nan


class Mezo:
    """Training without backward passes: the loss on both sides of the weights along one random direction gives the
    slope there, and the step follows it. What was found, 16 bytes a step, goes to replay.bin, which rebuilds the
    weights without data or checkpoint. Source: Malladi et al. 2023, Fine-Tuning Language Models with Just Forward
    Passes; there the direction is added and taken off again, here the weights are kept beside it: what is replayed is
    the same bits.
    """

    ROW, HEAD = "<4f", 32  # slope, rate factor, fraction of training, loss; before all, sha256 of the final weights

    def __init__(self, optimizer: Optimizer, seed: int, path: Path) -> None:
        self.optimizer, self.seed, self.path, self.slope = optimizer, seed, path, 0.0

    def directions(self, step: int) -> Iterator[tuple[nn.Parameter, Tensor, float]]:
        """Every parameter once with its direction in a step, and how far that is probed."""
        settings = self.optimizer.settings
        for name, parameter in self.optimizer.parameters.items():
            route = self.optimizer.latents.get(name)
            yield (parameter, mezo_direction(parameter.detach(), route, stream_seed(self.seed, f"mezo {name}", step)),
                   settings.mezo_eps if route is None else settings.mezo_eps_ternary)

    @torch.no_grad()
    def probe(self, step: int, loss: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
        """The losses on both sides; the weights are afterwards what they were, to the bit."""
        parameters, sides = list(self.optimizer.parameters.values()), []
        held = [parameter.clone() for parameter in parameters]
        for sign in (1.0, -1.0):
            for parameter, direction, reach in self.directions(step):
                parameter.add_(direction, alpha=sign * reach)
            sides.append(loss())
            torch._foreach_copy_(parameters, held)
        return sides[0], sides[1]

    @torch.no_grad()
    def fill(self, step: int, slope: float) -> None:
        """Gradients from half the difference of the two losses."""
        self.slope = slope
        for parameter, direction, reach in self.directions(step):
            parameter.grad = direction.mul_(slope / reach)

    def step(self, trainer: "Trainer", phase: int, factor: float, frac: float
             ) -> tuple[Tensor, Tensor, float, float]:
        """Gradients of the trainer's next step: the mean of the two losses, the norm of what their difference stands
        for, and factor and fraction as the log holds them."""
        batches, step = list(trainer.micro_batches(phase)), trainer.step

        def work(batch: Batch) -> Tensor:
            with torch.no_grad():
                return trainer.run_loss(phase, batch) / trainer.micros

        def loss() -> Tensor:
            with trainer.as_stored(frac, training=True):
                parts = [part for some in batches for part in trainer.world.each(work, some)]
            return trainer.world.add_(torch.stack(parts).double().sum())  # their difference is small

        plus, minus = self.probe(step, loss)
        self.fill(step, float(plus - minus) / 2)
        grads = [parameter.grad for parameter in self.optimizer.parameters.values()]
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
        clip = self.optimizer.settings.grad_clip_norm
        slope = self.slope * (clip / float(norm) if clip and norm > clip else 1.0)
        row = struct.unpack(self.ROW, struct.pack(self.ROW, slope, factor, frac, float(plus + minus) / 2))
        self.fill(step, row[0])
        if trainer.world.first:
            self.write(step, *row)
        return plus.new_tensor(row[3]).float(), norm, row[1], row[2]

    def write(self, step: int, *values: float) -> None:
        """Log a step; a step that was logged before the run was killed is written again."""
        with self.open_at(step) as file:
            file.write(struct.pack(self.ROW, *values))

    def open_at(self, step: int) -> Any:
        """The log, opened and cut behind its first `step` steps; ConfigError where it does not hold them."""
        at = self.HEAD + step * struct.calcsize(self.ROW)
        file = self.path.open("r+b" if self.path.exists() else "w+b")
        if not step:
            file.write(bytes(self.HEAD))
        if file.seek(0, os.SEEK_END) < at:
            file.close()
            raise ConfigError(f"{self.path}: must hold the {step} steps of checkpoint.pt; use another RUN_ID")
        file.truncate(at)
        file.seek(at)
        return file

    def close(self, step: int, average: Mapping[str, Tensor]) -> None:
        """Log what the weights and their average came to after `step` steps."""
        with self.open_at(step) as file:
            file.seek(0)
            file.write(bytes.fromhex(self.digest(self.optimizer.parameters, average)))

    @staticmethod
    def digest(weights: Mapping[str, Tensor], average: Mapping[str, Tensor]) -> str:
        """sha256 of the weights and of their average."""
        return weights_digest({**weights, **{f"average {name}": tensor for name, tensor in average.items()}})

    @classmethod
    def rebuild(cls, config: Config, model: GPT, path: Path, world: World) -> Checkpoint:
        """The end of a training from its log; CheckError where it leads to other weights than it did."""
        data = path.read_bytes()
        digest, body = data[:cls.HEAD], data[cls.HEAD:]
        if not any(digest) or not body or len(body) % struct.calcsize(cls.ROW):
            raise ConfigError(f"{path}: the training it logs was not finished")
        init_weights(model, config.run.seed)
        optimizer = Optimizer(model, config.optim, world, model.dtype, routes_of(model, config.artifact))
        average, mezo = Average(model, config.optim.ema_decay), cls(optimizer, config.run.seed, path)
        for step, (slope, factor, frac, loss) in enumerate(struct.iter_unpack(cls.ROW, body)):
            mezo.fill(step, slope)
            optimizer.step(factor, 0.0, decay_factor(config.optim, frac), frac, torch.tensor(loss, device=world.device))
            average.update()
        weights = {name: parameter.detach().cpu() for name, parameter in model.named_parameters()}
        if cls.digest(weights, average.shadow) != digest.hex():
            raise CheckError(f"{path}: leads to other weights here than where it was made; settings that training "
                             "read, torch or the kind of device differ")
        return Checkpoint(step + 1, 0.0, True, loss, config.digest(), "", weights, average.shadow, {},
                          {}, {})


ESTIMATORS: dict[str, type[Mezo]] = {"mezo": Mezo}

BUCKET_ELEMENTS = 1 << 22  # gradients that travel together


IMBALANCE_ALARM = 0.15


class Trainer:
    """One run's training: builds everything, resumes if there is a checkpoint, and walks the steps."""

    def __init__(self, config: Config, model: GPT, data: Data, world: World, log: Log, folder: Path,
                 compiled: bool, score_float: Callable[[int], tuple[float, float]],
                 plan_ahead: Callable[[], tuple[float, float]] = lambda: (0.0, 0.0), began: float | None = None
                 ) -> None:
        self.config, self.model, self.world, self.log, self.folder = config, model, world, log, folder
        self.data, self.compiled, self.score_float, self.plan_ahead = data, compiled, score_float, plan_ahead
        self.batches = Batches(data.train, config.data, config.train, config.run.seed, model.packed)
        estimator = ESTIMATORS.get(config.optim.matrix_optimizer)
        # Without a backward pass there is no gradient that could overflow.
        self.prefetch = Prefetch(self.batches, world)
        self.scale = LossScale(torch.float32 if estimator else model.dtype)
        self.length, self.changed_at = length_at(config.train, 0.0), -config.train.seq_change_warmup_steps
        # Steps that may still be computed: (step, loss and gradient norm, rate factor, fraction, event). A GPU may be
        # that far behind; the host never waits for more than the oldest.
        self.flying: list[tuple[int, Tensor, float, float, Any]] = []
        self.reference = reference_losses(config.train.reference_run) if config.train.reference_run else []
        self.recent: list[tuple[float, float]] = []  # (fraction, loss) of steps, where there is a reference
        self.begun: float | None = None  # the fraction at which this process began
        self.depth = 2 if world.device.type == "cuda" and not self.scale.on else 0
        self.replayed = config.system.cuda_graphs
        if self.replayed and not (compiled and world.device.type == "cuda"):
            raise ConfigError("CUDA_GRAPHS=1: needs a GPU and a compiled step, see COMPILE")
        self.reserve, self.before = config.train.reserve_seconds, 0.0
        # On the strict clock: when this process began, and what earlier ones of this run spent.
        self.began, self.earlier = log.clock() if began is None else began, 0.0
        self.optimizer = Optimizer(model, config.optim, world, model.dtype, routes_of(model, config.artifact))
        self.average = Average(model, config.optim.ema_decay)
        self.mezo = estimator(self.optimizer, config.run.seed, folder / "replay.bin") if estimator else None
        routes = routes_of(model, config.artifact)
        self.routes = {name: routes[name] for name in qat_parts(model, config.artifact)}
        self.trit_routes = {name: route for name, route in routes.items() if route.format == "ternary"}
        self.trits: dict[str, Tensor] = {}
        self.told: tuple[int, dict[str, float]] = (-1, {})
        self.depths: list[float] = []  # mean passes of the rows of each micro-batch since they were last told
        self.drawn = random_depth(model.settings.stack)
        # A plan of training's own, behind the model's: one pass a group by cadence, or as many as can be drawn.
        self.own = plan_phase(model.settings, 0.0, deepest=True) if self.drawn else (
            plan_phase(model.settings, 0.0, 1) if cadences(config.train) != {1} else None)
        self.micros = config.train.train_batch_tokens // config.train.micro_batch_tokens
        if self.micros % world.size:
            raise ConfigError(f"NPROC={world.size}: must divide the {self.micros} micro-batches of a step "
                              f"(TRAIN_BATCH_TOKENS over MICRO_BATCH_TOKENS={config.train.micro_batch_tokens})")
        self.step, self.last_loss, self.finished = 0, math.nan, False
        self.watch = Stopwatch(log.clock, 0.0)
        self.saved_at = self.resumed_at = 0.0
        self.slowest = self.landed_at = 0.0
        self.coverage = Coverage(model, dropped_parts(model.settings) if config.train.pass_drop else ())
        self.losses: list[Callable[..., Tensor]] = []
        self.grams = TEACHERS["ngrams"](config, self.batches) if "ngrams" in teachers_of(config) else None
        self.board: Any = None
        self.writer, self.saving = ThreadPoolExecutor(1), None

    # -- set-up

    def resume(self) -> bool:
        """Continue from checkpoint.pt when there is one; True when training was finished already. Under a wall clock
        the seconds that were spent after the checkpoint count."""
        path, timed = self.folder / "checkpoint.pt", bool(self.config.train.max_wallclock_seconds)
        logged, had_checkpoint = self._logged()
        if not path.exists():
            # Killed before its first checkpoint; a checkpoint that was written and is gone was deleted to start anew.
            spent = 0.0 if had_checkpoint else self.world.same(logged)
            if spent:
                self.log.line(f"restarted: killed before its first checkpoint, train_time:{spent * 1000:.0f}ms spent")
                self.log.event("resume", step=0, train_seconds=spent if timed else 0.0)
            self.log.event("start")
            self.watch.spent = self.saved_at = self.resumed_at = self.earlier = spent if timed else 0.0
            return False
        held = load_checkpoint(path)
        if held.config_hash != self.config.digest():
            raise ConfigError(f"RUN_ID={self.folder.name}: {path} was made with other settings; use another RUN_ID")
        if held.data_hash != self.data.manifest_sha256:
            raise ConfigError(f"DATA_PATH={self.config.data.data_path}: {path} was made with another dataset")
        load_weights(self.model, held.weights, f"RUN_ID={self.folder.name}: {path}")
        if {name: set(kinds) for name, kinds in held.state.items()} != {
                name: set(kinds) for name, kinds in self.optimizer.state.items()}:
            raise ConfigError(f"RUN_ID={self.folder.name}: {path} holds the state of another optimizer")
        for name, kinds in self.optimizer.state.items():
            for kind, tensor in kinds.items():
                tensor.copy_(held.state[name][kind])
        for name, tensor in self.average.shadow.items():
            tensor.copy_(held.average[name])
        self.optimizer.counts.update(held.counts)
        self.step, self.last_loss, self.finished = held.step, held.last_loss, held.finished
        pace = held.pace
        if bool(pace["packed"]) != self.model.packed:
            raise ConfigError(f"RUN_ID={self.folder.name}: {path} was trained on rows with packed:{pace['packed']}, "
                              f"here attention wants packed:{self.model.packed}, and would read other data; resume "
                              "where the same kernels run, or use another RUN_ID")
        self.length, self.changed_at = int(pace["length"]), int(pace["changed_at"])
        self.scale.value, self.scale.good = pace["scale"], int(pace["good"])
        self.reserve, self.before = self.reserve or pace["reserve"], pace["before"]
        seconds = max(held.seconds, logged) if timed and not held.finished else held.seconds
        self.watch.spent = self.saved_at = self.resumed_at = self.world.same(seconds)
        self.earlier = pace["strict"] + self.resumed_at - held.seconds
        self.slowest, self.landed_at = seconds / max(1, self.step), seconds
        self.log.line(f"resumed:{path} step:{self.step} train_time:{self.watch.spent * 1000:.0f}ms"
                      + (" (training was finished)" if held.finished else ""))
        self.log.event("resume", step=self.step, train_seconds=self.watch.spent)
        return self.finished

    def _logged(self) -> tuple[float, bool]:
        """The last training second that events.jsonl knows of since the run's last start, and whether it wrote a
        checkpoint since. A line that a kill cut short counts for nothing."""
        seconds, written = 0.0, False
        try:
            lines = (self.folder / "events.jsonl").read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            return seconds, written
        for line in lines:
            try:
                event = json.loads(line)
            except ValueError:
                continue
            if event.get("event") == "start":
                # The seconds of a start that never reached a checkpoint stay spent.
                seconds, written = (0.0, False) if written else (seconds, False)
            seconds = max(seconds, float(event.get("train_seconds", 0.0)))
            written = written or event.get("event") == "checkpoint"
        return seconds, written

    def shapes(self) -> list[tuple[int, int]]:
        """The phases and contexts that occur together, in their order. A packed row has one shape for all contexts."""
        plan, knots = self.model.phases, parse_seq_schedule(self.config.train)
        starts = sorted({phase.start for phase in plan} | {start for start, _ in knots})
        found = dict.fromkeys((phase_at(plan, frac), knots[-1][1] if self.model.packed else
                               length_at(self.config.train, frac)) for frac in starts)
        own = dict.fromkeys((len(plan), length) for _, length in found) if self.own else {}
        return [*found, *own]

    def plan_at(self, progress: Progress) -> int:
        """The number of the next step's plan: the phase's, or that of training's own, which stands behind them: always
        where passes are drawn, by cadence else. Source: clowncar's micro crawler."""
        if self.drawn:
            return len(self.model.phases)
        phase, train = phase_at(self.model.phases, progress.frac), self.config.train
        rate = rate_factor(self.config.optim, progress)
        cadence = (train.crawler_cadence_early if rate > 0.5 else train.crawler_cadence_main if rate > 0.2 else
                   train.crawler_cadence_late)
        return phase if cadence and self.step % cadence == 0 else len(self.model.phases)

    def warm_up(self) -> None:
        """Compile and run every phase in every context on random tokens before the clock starts; no weight changes."""
        settings = self.config.train
        plans = range(len(self.model.phases) + bool(self.own))
        self.losses = [make_compiled(self.plain_loss(phase), self.compiled, replayed=self.replayed) for phase in plans]
        generator = torch.Generator().manual_seed(stream_seed(self.config.run.seed, "warm-up"))
        drawn = torch.randint(BOS + 3, self.config.data.vocab_size, (settings.micro_batch_tokens + 1,),
                              generator=generator)
        began = self.log.clock()
        if self.grams is not None:
            # A killed run counts again what it had counted.
            self.grams.absorb(range(self.step * self.micros), self.world)
        stream = TokenStream([drawn.numpy(), drawn.numpy(), drawn.numpy()])
        rows = Batches(stream, dataclasses.replace(self.config.data, shuffle=False), settings, 0, self.model.packed)
        for phase, length in self.shapes():
            batch = rows.micro(0, self.world, length)
            batch = self.passes_of(batch if self.grams is None else self.grams.lessons(batch), 0, phase, False)
            for _ in range(settings.warmup_steps):
                self.model.zero_grad(set_to_none=True)
                with torch.set_grad_enabled(self.mezo is None):
                    loss = self.run_loss(phase, batch)
                if self.mezo is None:
                    loss.backward()
            if self.mezo is not None:  # once, for the proof that everything is reached
                self.plain_loss(phase)(*batch).backward()
            self.coverage.saw_phase()
        self.model.zero_grad(set_to_none=True)
        self.coverage.check_phases()
        self.graphs = compiled_graphs() if self.compiled else 0
        if self.world.device.type == "cuda":
            # The first exchange between GPUs sets up their network, which takes seconds.
            self.world.add_(torch.zeros(1, device=self.world.device))
            torch.cuda.synchronize()
        spent = self.log.clock() - began
        reserve, writing = (0.0, 0.0) if self.reserve and not settings.strict_clock else self.plan_ahead()
        self.reserve = self.reserve or self.world.same(reserve)
        if settings.strict_clock:
            self.before = self.world.same(self.strict_seconds() - self.watch.spent + writing)
        self.log.line(f"warmup:{settings.warmup_steps} passes of {len(self.shapes())} plans and contexts in "
                      f"{spent:.1f}s; reserve:{self.reserve:.1f}s for the calibration"
                      + (f"; strict clock: {self.before:.1f}s for set-up and writing" if settings.strict_clock else ""))
        if settings.max_wallclock_seconds and self.budget() <= 0:
            raise CheckError(f"MAX_WALLCLOCK_SECONDS={settings.max_wallclock_seconds:g}: nothing is left for training "
                             f"beside {self.reserve:.1f} s of calibration and {self.before:.1f} s of set-up and "
                             "writing")

    def plain_loss(self, phase: int) -> Callable[..., Tensor]:
        """The loss of a plan, not compiled."""
        train = self.config.train
        return make_loss(self.model, (*self.model.phases, self.own)[phase], self.config.ngram.ngram_head_loss,
                         train.z_loss, train.grad_checkpoint)

    def strict_seconds(self) -> float:
        """Seconds on the strict clock so far: all of this process's stage, and of the processes before it."""
        return self.earlier + self.log.clock() - self.began

    def run_loss(self, phase: int, batch: Batch) -> Tensor:
        """The loss of a batch, through the compiled graph of its phase. The number of spans is told to be variable, so
        that another one makes no new graph."""
        if self.compiled and isinstance(batch.docs, Spans):
            torch._dynamo.maybe_mark_dynamic(batch.docs.starts, 0)
        if self.replayed:
            torch.compiler.cudagraph_mark_step_begin()
        return self.losses[phase](*batch)

    def passes_of(self, batch: Batch, index: int, phase: int, drop: bool = True) -> Batch:
        """The batch with PASS_DROP's draw for micro-batch `index` of the run, or with the drawn passes of each row;
        `drop` says whether any is left out."""
        chance = self.config.train.pass_drop
        if self.drawn and phase == len(self.model.phases):
            drawn = drawn_passes(self.model.settings, self.own, len(batch.tokens),
                                 stream_seed(self.config.run.seed, "passes", index) if drop else None)
            if drop:
                groups = [group for group, item in enumerate(parse_stack(self.model.settings.stack)[1]) if item.depth]
                firsts = [step.visit for step in self.own.steps
                          if step.turn and step.turn.first and step.turn.group in groups]
                self.depths.append(float((drawn[firsts] > 0).sum()) / len(groups) / len(batch.tokens))
            return batch._replace(keep=torch.from_numpy(drawn).to(self.world.device, non_blocking=True))
        if not chance:
            return batch
        steps = (*self.model.phases, self.own)[phase].steps
        rng = np.random.Generator(np.random.PCG64(stream_seed(self.config.run.seed, "pass drop", index)))
        drawn = rng.random(len(steps)) >= chance * drop
        return batch._replace(keep=torch.from_numpy(drawn).float().to(self.world.device, non_blocking=True))

    def budget(self) -> float:
        """Seconds that the loop may take; infinity without a clock."""
        limit = self.config.train.max_wallclock_seconds
        return limit - self.reserve - self.before if limit else math.inf

    @contextlib.contextmanager
    def as_stored(self, frac: float, training: bool = False) -> Iterator[None]:
        """From QAT_START on, the parameters of QAT_PARTS inside the block are what the artifact would hold of them or,
        while `training` with noise, near what they are. The compiled graph takes parameters as they are, so nothing in
        it has to be switched; gradients go straight to the weights."""
        settings = self.config.artifact
        noisy = settings.qat_kind == "noise"
        if frac < settings.qat_start or settings.qat_start == 1 or noisy and not training:
            yield
            return
        with torch.no_grad():
            held = {name: parameter.clone() for name, parameter in self.model.named_parameters()}
            if noisy:
                shake_weights(self.model, self.routes, stream_seed(self.config.run.seed, "noise", self.step))
            else:
                store_weights(self.model, self.routes)
        try:
            yield
        finally:
            load_weights(self.model, held, "weights before projection")

    # -- one step

    def progress(self) -> Progress:
        """Where training stands by rank 0's clock or, without a budget, by steps."""
        settings = self.config.train
        frac, left, room = self.step / settings.iterations, float(settings.iterations - self.step), math.inf
        if settings.max_wallclock_seconds:
            seconds, self.slowest = self.world.same((self.watch.seconds(), self.slowest))
            budget = self.budget()
            frac, room = max(frac, min(1.0, seconds / budget)), max(0.0, budget - seconds)
            if self.step:
                left = min(left, room / max(seconds / self.step, 1e-9))
        return Progress(self.step, frac, left, room)

    def micro_batches(self, phase: int) -> Iterator[list[Batch]]:
        """This rank's micro-batches of the step, as many at a time as there are lanes."""
        first, lanes = self.step * self.micros, self.world.lanes
        mine = range(first + self.world.rank, first + self.micros, self.world.size)
        coming = [*mine, *(index + self.micros for index in mine)]
        for start in range(0, len(mine), lanes):
            batches = [self.prefetch.take(coming[at], self.length, coming[at + 1:])
                       for at in range(start, min(start + lanes, len(mine)))]
            batches = batches if self.grams is None else [self.grams.lessons(batch) for batch in batches]
            yield [self.passes_of(batch, coming[at], phase) for at, batch in enumerate(batches, start)]

    def gradients(self, phase: int) -> tuple[Tensor, Tensor]:
        """Fill the gradients of the global batch; its mean loss in nats and the gradient norm, on the device."""
        total = torch.zeros((), device=self.world.device)
        self.model.zero_grad(set_to_none=True)
        parameters = list(self.model.parameters())

        def work(batch: Batch) -> tuple[Tensor, tuple[Tensor | None, ...]]:
            loss = self.run_loss(phase, batch) / self.micros
            return loss.detach(), torch.autograd.grad(loss * self.scale.value if self.scale.on else loss, parameters,
                                                      allow_unused=True)

        for batches in self.micro_batches(phase):
            for loss, grads in self.world.each(work, batches):
                total = total + loss
                for parameter, grad in zip(parameters, grads, strict=True):
                    if grad is not None and parameter.grad is None:
                        # A replayed graph writes its next results where these are.
                        parameter.grad = grad.clone() if self.replayed else grad
                    elif grad is not None:
                        parameter.grad.add_(grad)
        grads = sorted((p.grad for p in self.model.parameters() if p.grad is not None), key=lambda grad: -grad.numel())
        if self.world.size > 1:
            self.sum_over_ranks(total, grads)
        if self.scale.on:
            torch._foreach_mul_(grads, 1 / self.scale.value)
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
        clip = self.config.optim.grad_clip_norm
        if clip:
            torch._foreach_mul_(grads, (clip / norm.clamp_min(1e-12)).clamp_max(1.0))
        return total, norm

    def sum_over_ranks(self, total: Tensor, grads: list[Tensor]) -> None:
        """Sum the loss and the gradients over ranks, in buckets, largest gradients first: one is copied back while the
        next ones travel."""
        buckets: list[list[Tensor]] = [[]]
        for tensor in [*grads, total]:
            if sum(map(torch.numel, buckets[-1])) > BUCKET_ELEMENTS:
                buckets.append([])
            buckets[-1].append(tensor)
        flats = [torch.cat([tensor.flatten() for tensor in bucket]) for bucket in buckets]
        waits = [self.world.begin_add(flat) for flat in flats]
        for bucket, flat, wait in zip(buckets, flats, waits, strict=True):
            wait()
            pieces = flat.split([tensor.numel() for tensor in bucket])
            torch._foreach_copy_(bucket, [piece.view_as(tensor) for piece, tensor in zip(pieces, bucket, strict=True)])

    def one_step(self, progress: Progress) -> None:
        """Gradients, update, average; the log follows when the loss is there."""
        phase, length = self.plan_at(progress), length_at(self.config.train, progress.frac)
        if length != self.length:
            self.length, self.changed_at = length, self.step
            self.log.line(f"step:{self.step} context:{length}")
        ramp, frac = self.config.train.seq_change_warmup_steps, progress.frac
        factor = rate_factor(self.config.optim, progress) * min(1.0, (self.step - self.changed_at + 1) / max(1, ramp))
        if self.mezo is None:
            with self.as_stored(frac, training=True):
                loss, norm = self.gradients(phase)
        else:
            loss, norm, factor, frac = self.mezo.step(self, phase, factor, frac)
        if self.coverage.still:
            self.coverage.saw_step()
        if self.depth or self.usable(self.step, loss.item(), norm.item()):
            self.optimizer.step(factor, momentum_at(self.config.optim, self.step),
                                decay_factor(self.config.optim, frac), frac, loss)
            self.average.update()
        if self.grams is not None:
            self.grams.absorb(range(self.step * self.micros, (self.step + 1) * self.micros), self.world)
        self.step += 1
        told, mark = torch.empty(2, pin_memory=bool(self.depth)), torch.cuda.Event() if self.depth else None
        told.copy_(torch.stack((loss, norm)), non_blocking=True)
        if mark is not None:
            mark.record()
        self.flying.append((self.step, told, factor, progress.frac, mark))
        self.land(self.depth)

    def usable(self, step: int, loss: float, norm: float) -> bool:
        """Whether a step's gradients may be used; CheckError where training diverged."""
        finite = math.isfinite(loss) and math.isfinite(norm)
        use = self.scale.saw(finite)
        if not finite and use:
            raise CheckError(f"step {step}: train_loss={loss}, gradient norm {norm}: training diverged; lower "
                             f"MATRIX_LR={self.config.optim.matrix_lr:g}, TIED_EMBED_LR or SCALAR_LR, or set "
                             "GRAD_CLIP_NORM=1; the last checkpoint is kept")
        if not finite:
            self.log.line(f"step:{step} left out: a float16 gradient overflowed; loss scale {self.scale.value:g}")
        return use

    def land(self, flying: int) -> None:
        """Log the steps that are done, until at most `flying` are left in the air."""
        while len(self.flying) > flying:
            step, told, factor, frac, mark = self.flying.pop(0)
            if mark is not None:
                mark.synchronize()
            found, size = told.tolist()
            if self.depth:
                self.usable(step - 1, found, size)
            seconds, self.last_loss = self.watch.seconds(), found
            self.slowest = max(seconds - self.landed_at, 0.95 * self.slowest)
            self.landed_at = seconds
            tokens = step * self.config.train.train_batch_tokens
            self.log.event("step", step=step, train_loss=found, lr_factor=factor, train_seconds=seconds, tokens=tokens,
                           grad_norm=size, frac=round(frac, 5))
            if self.reference:
                self.recent.append((frac, found))
            if step % self.config.train.train_log_every == 0 or step <= 3:
                self.log.line(f"step:{step}/{self.config.train.iterations} train_loss:{found:.4f} "
                              f"train_time:{seconds * 1000:.0f}ms step_avg:{seconds * 1000 / step:.2f}ms")
            if self.board is not None:
                for tag, value in (("train_loss", found), ("lr_factor", factor), ("grad_norm", size)):
                    self.board.add_scalar(tag, value, step)

    # -- around the steps

    def validate(self, frac: float) -> None:
        """Score the weights as the forward uses them on the whole validation split; the training clock stands still."""
        self.land(0)
        if not self.config.train.strict_clock:
            self.watch.stop()
        with self.as_stored(frac):
            nats, bpb = self.score_float(phase_at(self.model.phases, frac))
        seconds = self.watch.seconds()
        self.log.line(f"step:{self.step}/{self.config.train.iterations} val_loss:{nats:.4f} "
                      f"val_bpb:{bpb:.4f} train_time:{seconds * 1000:.0f}ms "
                      f"step_avg:{seconds * 1000 / max(1, self.step):.2f}ms")
        self.log.event("val", step=self.step, val_loss=nats, val_bpb=bpb, train_seconds=seconds)
        self.tell_loops()
        self.tell_parts()
        if self.board is not None:
            self.board.add_scalar("val_bpb", bpb, self.step)
        if not self.config.train.strict_clock:
            self.watch.start()
        self.landed_at = self.watch.seconds()

    def tell_loops(self) -> dict[str, list[float]]:
        """How much is added before each pass of a group, over the norm of the stream there, on training rows: a channel
        that is dead shows as 0. Group -> shares of its passes."""
        if not self.model.loops:
            return {}
        shares: dict[str, dict[int, float]] = {}

        def watch(group: str, number: int) -> Callable[[Tensor, Tensor], Tensor]:
            def share(y: Tensor, x: Tensor) -> Tensor:
                found = float((y - x).float().norm() / x.float().norm().clamp_min(1e-30))
                shares.setdefault(group, {})[number] = found
                return y
            return share

        taps = {f"loops.{group}.pass.{number}": watch(group, number) for group, loop in self.model.loops.items()
                for number in range(loop.passes)}
        batch = self.batches.micro(0, self.world)
        with torch.no_grad():
            make_forward(self.model, self.own if self.drawn else len(self.model.phases) - 1)(
                batch.tokens, batch.docs, taps)
        told = {group: [round(found.get(number, 0.0), 5) for number in range(self.model.loops[group].passes)]
                for group, found in shares.items()}
        for group, found in told.items():
            self.log.line(f"step:{self.step} loop {group}: added before each pass, over the stream: "
                          + " ".join(f"{share:.4f}" for share in found))
        self.log.event("loops", step=self.step, added=told)
        return told

    def tell_parts(self) -> dict[str, float]:
        """Means over blocks of what rules their states (alpha: what is left of one at a token, beta: how strongly a
        token is written), the worst imbalance of experts, and the mean of the passes drawn since this was last told by
        this process; on training rows."""
        found: dict[str, list[float]] = {}

        def watch(tell: Callable[[Tensor], dict[str, float]]) -> Callable[[Tensor, Tensor], Tensor]:
            def note(y: Tensor, x: Tensor) -> Tensor:
                for name, value in tell(y).items():
                    found.setdefault(name, []).append(value)
                return y
            return note

        taps = {f"v{step.visit}.{site}": watch(part.tell) for step in self.model.phases[-1].steps
                for site, part in (("gates", self.model.blocks[step.block].mixer),
                                   ("route", self.model.blocks[step.block].mlp)) if hasattr(part, "tell")}
        if taps:
            batch = self.batches.micro(0, self.world)
            with torch.no_grad():
                make_forward(self.model, len(self.model.phases) - 1)(batch.tokens, batch.docs, taps)
        told = {name: max(values) if name == "imbalance" else statistics.fmean(values)
                for name, values in sorted(found.items())}
        if self.depths:
            told["passes"], self.depths = statistics.fmean(self.depths), []
        if told:
            self.log.line(f"step:{self.step} parts: " + " ".join(f"{name} {value:.4f}" for name, value in told.items())
                          + (f" (experts are uneven: more than {IMBALANCE_ALARM:g} over the mean)"
                             if told.get("imbalance", 0.0) > IMBALANCE_ALARM else ""))
            self.log.event("parts", step=self.step, **told)
        return told

    def tell_trits(self) -> dict[str, float]:
        """Of all ternary weights: the share of zeros, the entropy in bits of a trit by itself, and the share that has
        changed since this was last told by this process."""
        own = dict(self.model.named_parameters())
        if not self.trit_routes or self.told[0] == self.step:
            return self.told[1]
        codes = {name: FORMATS[route.format].encode(own[name].detach(), route).codes
                 for name, route in self.trit_routes.items()}
        count = sum(map(torch.numel, codes.values()))
        shares = [float(sum((part == trit).sum() for part in codes.values())) / count for trit in (-1, 0, 1)]
        moved = sum((part != self.trits[name]).sum() for name, part in codes.items()) if self.trits else None
        churn, self.trits = None if moved is None else float(moved) / count, codes
        told = {"zeros": shares[1], "bits": -sum(p * math.log2(p) for p in shares if p),
                **({} if churn is None else {"churn": churn})}
        self.log.line(f"step:{self.step} trits: zeros {told['zeros']:.3f} entropy {told['bits']:.4f} bits of {count:,}"
                      + ("" if churn is None else f", changed {churn:.4f}"))
        self.log.event("trits", step=self.step, train_seconds=self.watch.seconds(), **told)
        if self.board is not None:
            for tag, value in told.items():
                self.board.add_scalar(f"trits/{tag}", value, self.step)
        self.told = self.step, told
        return told

    def save(self, finished: bool) -> None:
        """Write the checkpoint on rank 0: copied here, written beside the next steps. The last one is waited for."""
        self.land(0)
        self.saved_at = self.watch.seconds()
        if not self.world.first:
            return
        if self.saving is not None:
            self.saving.result()
        weights = {name: p.detach().clone().cpu() for name, p in self.model.named_parameters()}
        average = {name: tensor.clone().cpu() for name, tensor in self.average.shadow.items()}
        state = {name: {kind: tensor.clone().cpu() for kind, tensor in kinds.items()}
                 for name, kinds in self.optimizer.state.items()}
        held = Checkpoint(self.step, self.saved_at, finished, self.last_loss, self.config.digest(),
                          self.data.manifest_sha256, weights, average, state, dict(self.optimizer.counts),
                          {"length": self.length, "changed_at": self.changed_at, "scale": self.scale.value,
                           "good": self.scale.good, "packed": self.model.packed, "reserve": self.reserve,
                           "before": self.before, "strict": self.strict_seconds()})
        self.saving = self.writer.submit(self._write, held)
        if finished:
            self.saving.result()
        self.landed_at = self.watch.seconds()

    def _write(self, held: Checkpoint) -> None:
        save_checkpoint(self.folder / "checkpoint.pt", held)
        self.log.event("checkpoint", step=held.step)

    def meet_reference(self, frac: float) -> None:
        """CheckError, once the checkpoint is written, where the run is hopeless beside its reference."""
        if self.begun is None:
            self.begun = frac
        while self.reference and self.reference[0][0] <= frac:
            (mark, wanted), margin = self.reference.pop(0), self.config.train.reference_margin
            self.land(0)
            found = mean_loss(self.recent, mark)
            if math.isnan(found) or mark - REFERENCE_SHARE < self.begun:  # resumed behind its beginning
                continue
            self.log.line(f"step:{self.step} at {mark:.0%} train_loss:{found:.4f} reference:{wanted:.4f}")
            if found > wanted + margin:
                self.save(finished=False)
                if self.saving is not None:
                    self.saving.result()
                raise CheckError(f"REFERENCE_RUN={self.config.train.reference_run}: at {mark:.0%} of training the loss "
                                 f"is {found:.4f}, more than REFERENCE_MARGIN={margin:g} above its {wanted:.4f}; "
                                 "stopped, the same RUN_ID without REFERENCE_RUN goes on")

    def must_stop(self, progress: Progress) -> bool:
        """True when the steps are done, or one more step as slow as the slowest of late would not fit the budget."""
        return self.step >= self.config.train.iterations or (
            progress.seconds_left <= self.slowest * (1 + len(self.flying)))

    def run(self) -> dict[str, Any]:
        """Train to the end; returns the `train` part of result.json."""
        if not self.finished:
            self.warm_up()
            self._open_bar_and_board()
            self.watch.start()
            self.landed_at = self.watch.seconds()
            self._loop()
            self.watch.stop()
            if self.mezo is not None and self.world.first:
                self.mezo.close(self.step, self.average.shadow)
            self.save(finished=True)
        check_same_weights(self.model, self.world)
        memory = peak_memory_bytes(self.world.device)
        loops, trits, parts = self.tell_loops(), self.tell_trits(), self.tell_parts()
        if self.world.device.type == "cuda":
            reserved = torch.cuda.max_memory_reserved(self.world.device)
            self.log.line(f"peak memory allocated: {memory >> 20} MiB reserved: {reserved >> 20} MiB")
        else:
            self.log.line(f"peak memory allocated: {memory >> 20} MiB reserved: {memory >> 20} MiB")
        tokens = self.step * self.config.train.train_batch_tokens
        seconds = self.watch.seconds()
        return {"steps": self.step, "tokens": tokens, "seconds": seconds,
                "tokens_per_second": tokens / seconds if seconds else 0.0, "final_train_loss": self.last_loss,
                "peak_memory_bytes": memory, **({"added_before_passes": loops} if loops else {}),
                **({"trits": trits} if trits else {}), **({"parts": parts} if parts else {})}

    def _open_bar_and_board(self) -> None:
        """Progress bar on a terminal, curves for TensorBoard; rank 0 only."""
        if not self.world.first:
            return
        if sys.stderr.isatty():
            from tqdm import tqdm
            self.log.bar = tqdm(total=100, desc="train", bar_format="{l_bar}{bar}| {elapsed}<{remaining}{postfix}")
        if self.config.run.tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise ConfigError("TENSORBOARD=1: needs the package tensorboard; install it or set "
                                  "TENSORBOARD=0") from None
            self.board = SummaryWriter(str(self.folder / "tensorboard"))

    def _loop(self) -> None:
        settings = self.config.train
        while not self.must_stop(progress := self.progress()):
            self.meet_reference(progress.frac)
            if settings.val_loss_every and self.step and self.step % settings.val_loss_every == 0:
                self.validate(progress.frac)
            self.one_step(progress)
            if self.trit_routes and self.step % settings.train_log_every == 0:
                self.tell_trits()
                self.landed_at = self.watch.seconds()
            if self.step % settings.sync_check_every == 0:
                check_same_weights(self.model, self.world)
                self.landed_at = self.watch.seconds()
            if settings.checkpoint_seconds and self.watch.seconds() - self.saved_at >= settings.checkpoint_seconds:
                self.save(finished=False)
            if self.log.bar is not None:
                self.log.bar.n = round(100 * progress.frac)
                self.log.bar.set_postfix_str(f"step {self.step} loss {self.last_loss:.3f}", refresh=True)
        self.land(0)
        if self.log.bar is not None:
            self.log.bar.close()
            self.log.bar = None
        if self.board is not None:
            self.board.close()
            self.board = None
        if self.compiled and compiled_graphs() > self.graphs:
            self.log.line(f"recompiled: {compiled_graphs() - self.graphs} graphs after the warm-up, inside the clock")
        if self.step < settings.iterations:
            self.log.line(f"stopping_early: wallclock_cap train_time:{self.watch.seconds() * 1000:.0f}ms "
                          f"step:{self.step}/{settings.iterations}")


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory this process held: on the GPU, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# ==== 12 ARTIFACT ===========================================================================================
# Weights to as few bytes as the loss allows, and back. Calibration sees what goes into and out of every matrix;
# the squeeze solves the codes, divided over ranks; streams of like symbols go through the smallest codec; the
# fit chooses the steps so that all of it ends just below the cap. The container is our own: magic, version,
# header, streams, checksum; no pickle, no dates, the same bytes every time. A reader trusts no length before it
# has checked it. To add a codec: add a row to CODECS; the tests try every row.

MAGIC, CONTAINER_VERSION = b"SIXTEEN\0", 2
HEADER_LIMIT_BYTES = 1 << 20
# A reader allocates by what the header declares, so that may not be far from what the bytes can hold; a file with fewer
# bits a weight, which no useful model has, is padded.
WEIGHTS_PER_BYTE, WEIGHTS_FREE = 16, 1 << 18

Matrices = list[np.ndarray]
Shapes = list[tuple[int, int]]


def _need(package: str, codec: str) -> Any:
    """The compressor's module, or ConfigError: a compressor that was asked for and is missing is never replaced."""
    if importlib.util.find_spec(package) is None:
        raise ConfigError(f"CODEC={codec}: needs the Python package {package}, which is not installed")
    return importlib.import_module(package)


# -- layouts: matrices of symbols as bytes, for the byte compressors


def _flat(matrices: Matrices, low: int) -> np.ndarray:
    """All symbols, shifted to start at 0, uint8 (n,)."""
    return (np.concatenate([matrix.ravel() for matrix in matrices]).astype(np.int16) - low).astype(np.uint8)


def _unflat(symbols: np.ndarray, shapes: Shapes, low: int) -> Matrices:
    """The inverse of _flat."""
    ends = np.cumsum([rows * columns for rows, columns in shapes])[:-1]
    return [part.reshape(shape) for part, shape in
            zip(np.split((symbols.astype(np.int16) + low).astype(np.int8), ends), shapes, strict=True)]


def _exactly(data: bytes, count: int) -> np.ndarray:
    """The bytes as uint8 (count,), or ValueError."""
    if len(data) != count:
        raise ValueError(f"{len(data)} bytes where {count} were declared")
    return np.frombuffer(data, np.uint8)


def _count(shapes: Shapes) -> int:
    return sum(rows * columns for rows, columns in shapes)


def rows_pack(matrices: Matrices, low: int, high: int) -> bytes:
    """A byte a symbol, row after row."""
    return _flat(matrices, low).tobytes()


def rows_unpack(data: bytes, shapes: Shapes, low: int, high: int) -> Matrices:
    """The inverse of rows_pack."""
    return _unflat(_exactly(data, _count(shapes)), shapes, low)


def columns_pack(matrices: Matrices, low: int, high: int) -> bytes:
    """A byte a symbol, column after column."""
    return _flat([matrix.T for matrix in matrices], low).tobytes()


def columns_unpack(data: bytes, shapes: Shapes, low: int, high: int) -> Matrices:
    """The inverse of columns_pack."""
    turned = _unflat(_exactly(data, _count(shapes)), [(columns, rows) for rows, columns in shapes], low)
    return [matrix.T for matrix in turned]


def base3_pack(matrices: Matrices, low: int, high: int) -> bytes:
    """Five trits a byte, 243 of 256 values used."""
    trits = _flat(matrices, low)
    return (np.pad(trits, (0, -len(trits) % 5)).reshape(-1, 5) @ 3 ** np.arange(5)).astype(np.uint8).tobytes()


def base3_unpack(data: bytes, shapes: Shapes, low: int, high: int) -> Matrices:
    """The inverse of base3_pack."""
    count = _count(shapes)
    packed = _exactly(data, -(-count // 5)).astype(np.int16)
    return _unflat((packed[:, None] // 3 ** np.arange(5) % 3).reshape(-1)[:count], shapes, low)


def bits_pack(matrices: Matrices, low: int, high: int) -> bytes:
    """One plane of bits after the other, eight weights a byte."""
    symbols = _flat(matrices, low)
    return b"".join(np.packbits(symbols >> bit & 1).tobytes() for bit in range((high - low).bit_length()))


def bits_unpack(data: bytes, shapes: Shapes, low: int, high: int) -> Matrices:
    """The inverse of bits_pack."""
    count, planes = _count(shapes), (high - low).bit_length()
    packed = _exactly(data, planes * -(-count // 8)).reshape(planes, -1)
    symbols = np.zeros(count, np.uint8)
    for bit, plane in enumerate(packed):
        symbols |= np.unpackbits(plane, count=count) << bit
    return _unflat(symbols, shapes, low)


def signs_pack(matrices: Matrices, low: int, high: int) -> bytes:
    """Trits as a plane of `not zero`, then a sign for each that is not zero: 2 - z bits at a share z of zeros."""
    symbols = _flat(matrices, low)
    return np.packbits(symbols != 1).tobytes() + np.packbits(symbols[symbols != 1] >> 1).tobytes()


def signs_unpack(data: bytes, shapes: Shapes, low: int, high: int) -> Matrices:
    """The inverse of signs_pack."""
    count = _count(shapes)
    split = -(-count // 8)
    there = np.unpackbits(_exactly(data[:split], split), count=count)
    some = int(there.sum())
    symbols = np.ones(count, np.uint8)
    symbols[there == 1] = 2 * np.unpackbits(_exactly(data[split:], -(-some // 8)), count=some)
    return _unflat(symbols, shapes, low)


class Layout(NamedTuple):
    """A way of writing matrices of symbols low..high as bytes, its inverse, and the symbol counts it can hold."""
    pack: Callable[[Matrices, int, int], bytes]
    unpack: Callable[[bytes, Shapes, int, int], Matrices]
    symbols: range


# A stream's first byte is the letter of its layout.
LAYOUTS: dict[str, Layout] = {
    "r": Layout(rows_pack, rows_unpack, range(1, 257)),
    "c": Layout(columns_pack, columns_unpack, range(1, 257)),
    "b": Layout(bits_pack, bits_unpack, range(1, 65)),
    "3": Layout(base3_pack, base3_unpack, range(3, 4)),
    "s": Layout(signs_pack, signs_unpack, range(3, 4))}


# -- codecs of bytes


def zlib_decompress(blob: bytes, limit: int) -> bytes:
    """At most limit + 1 bytes."""
    return zlib.decompressobj().decompress(blob, limit + 1)


LZMA_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 1 << 24}]


def lzma_compress(data: bytes) -> bytes:
    """Raw LZMA2."""
    return lzma.compress(data, lzma.FORMAT_RAW, filters=LZMA_FILTERS)


def lzma_decompress(blob: bytes, limit: int) -> bytes:
    """At most limit + 1 bytes."""
    return lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=LZMA_FILTERS).decompress(blob, limit + 1)


def zstd_compress(data: bytes) -> bytes:
    """Level 22."""
    return _need("zstandard", "zstd").ZstdCompressor(level=22).compress(data)


def zstd_decompress(blob: bytes, limit: int) -> bytes:
    """What the frame declares, if that is within the limit."""
    zstandard = _need("zstandard", "zstd")
    try:
        if not 0 <= zstandard.frame_content_size(blob) <= limit:
            raise ValueError(f"the frame declares {zstandard.frame_content_size(blob)} bytes, {limit} fit")
        return zstandard.ZstdDecompressor(max_window_size=1 << 27).decompress(blob, max_output_size=limit)
    except zstandard.ZstdError as error:
        raise ValueError(f"zstd: {error}") from None


def brotli_compress(data: bytes) -> bytes:
    """Quality 11."""
    return _need("brotli", "brotli").compress(data, quality=11, lgwin=24)


def brotli_decompress(blob: bytes, limit: int) -> bytes:
    """At most limit + 1 bytes."""
    brotli = _need("brotli", "brotli")
    decoder, out = brotli.Decompressor(), b""
    try:
        more = decoder.process(blob, output_buffer_limit=limit + 1)
        while more and len(out := out + more) <= limit and not decoder.is_finished():
            more = decoder.process(b"", output_buffer_limit=limit + 1 - len(out))
    except brotli.error as error:
        raise ValueError(f"brotli: {error}") from None
    return out


def _bounded_child(command: list[str], data: bytes, limit: int, seconds: int = 600) -> bytes:
    """Standard output of a program that may write `limit` bytes and use bounded memory and time, or ValueError: formats
    whose decoders run programs of the file's own are never decoded in this process."""
    import resource

    def bounds() -> None:
        for what, most in ((resource.RLIMIT_FSIZE, limit + 1), (resource.RLIMIT_AS, (4 << 30) + 4 * limit),
                           (resource.RLIMIT_CPU, seconds)):
            resource.setrlimit(what, (most, most))

    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "in"), Path(folder, "out")
        source.write_bytes(data)
        words = [word.format(source=source, target=target) for word in command]
        done = subprocess.run(words, capture_output=True, preexec_fn=bounds, cwd=folder)
        if done.returncode or not target.exists():
            said = (done.stderr or done.stdout).decode(errors="replace").strip().splitlines()
            raise ValueError(f"{Path(command[0]).name}: {said[-1] if said else 'failed'}")
        return target.read_bytes()


def zpaq_compress(data: bytes) -> bytes:
    """Method 5, one thread."""
    return _need("zpaq", "zpaq").compress(data, level=5)


ZPAQ_CHILD = "import sys, zpaq; open(sys.argv[2], 'wb').write(zpaq.decompress(open(sys.argv[1], 'rb').read()))"


def zpaq_decompress(blob: bytes, limit: int) -> bytes:
    """Decoded in a bounded child: a zpaq file brings its own decoder program."""
    _need("zpaq", "zpaq")
    return _bounded_child([sys.executable, "-c", ZPAQ_CHILD, "{source}", "{target}"], blob, limit)


def lrzip_compress(data: bytes) -> bytes:
    """The program lrzip with its ZPAQ back end."""
    return _bounded_child(["lrzip", "-z", "-L", "9", "-q", "-f", "-o", "{target}", "{source}"], data,
                          2 * len(data) + 4096)


def lrzip_decompress(blob: bytes, limit: int) -> bytes:
    """Decoded in a bounded child."""
    return _bounded_child(["lrzip", "-d", "-q", "-f", "-o", "{target}", "{source}"], blob, limit)


def pack_bytes(matrices: Matrices, low: int, high: int, compress: Callable[[bytes], bytes]) -> tuple[bytes, None]:
    """The smallest of all layouts through a byte compressor. For long streams a sample chooses the layout."""
    fitting = [letter for letter, layout in LAYOUTS.items() if high - low + 1 in layout.symbols]
    if _count([matrix.shape for matrix in matrices]) > SAMPLE_SYMBOLS:
        sample = _sample(matrices)
        fitting = [min(fitting, key=lambda letter: len(compress(LAYOUTS[letter].pack(sample, low, high))))]
    blobs = [letter.encode() + compress(LAYOUTS[letter].pack(matrices, low, high)) for letter in fitting]
    return min(blobs, key=len), None


def unpack_bytes(blob: bytes, shapes: Shapes, low: int, high: int, decompress: Callable[[bytes, int], bytes]
                 ) -> Matrices:
    """The inverse of pack_bytes; ValueError unless the bytes hold exactly the declared symbols."""
    layout = LAYOUTS[blob[:1].decode()]
    if high - low + 1 not in layout.symbols:
        raise ValueError("a layout that cannot hold these symbols")
    return layout.unpack(decompress(blob[1:], _count(shapes) + len(LAYOUTS) + 8), shapes, low, high)


SAMPLE_SYMBOLS = 1 << 20


def _sample(matrices: Matrices) -> Matrices:
    """The first rows of every matrix, together about a quarter of SAMPLE_SYMBOLS."""
    share = SAMPLE_SYMBOLS / 4 / _count([matrix.shape for matrix in matrices])
    return [matrix[:math.ceil(share * len(matrix))] for matrix in matrices]


# -- the range coder
# Trained weights are close to Gaussian once the scale of their column is known, so a symbol's context is one number:
# the class of its predicted standard deviation, in eighths of an octave. The prediction multiplies a class sent for
# each column (or row: a matrix is turned where that is cheaper) with what the coded part of the row tells: a row that
# was divided by its own deviation has a known total energy, so what is left for its last columns is nearly known too.
# Rows of embeddings often resemble each other (unused tokens, spelling variants): there a row may name an earlier row
# and a factor to be predicted from. Every class has an integer table that starts as a Gaussian and learns from counts;
# no table is sent. Encoder and decoder run the same code, and what decoding depends on is integer arithmetic or single
# float64 operations that IEEE 754 defines exactly.

TOTAL = 1 << 16  # sum of a frequency table
CLASSES, UNIT = 90, 24  # scale class k stands for a standard deviation of 2 ** ((k - UNIT) / 8) steps
PRIOR = 32  # times the alphabet: how many symbols the Gaussian start of a table counts for
FLAT, BUDGET, REFERENCE = range(3)  # what is known about a row besides its columns
BETAS, ROWCLASSES = 12, 48  # a reference row counts beta / 8; row scales are quarters of an octave


@functools.cache
def _coding() -> Any:
    """The range coder of the constriction library."""
    return _need("constriction", "range").stream


@functools.cache
def _normal() -> np.ndarray:
    """Integral of exp(-t*t/2) from 0 in steps of 1/256 to 16, by integers only so that all machines agree."""
    one, step = 1 << 80, 1 << 63  # step = 2**-17 = (1/256)**2 / 2 in units of 1 / one
    term = ratio = one
    for n in range(1, 8):  # ratio = exp(-step) as a series
        term = -term * step // one // n
        ratio += term
    square, density, total, out = ratio * ratio >> 80, one, 0, [0]
    for _ in range(4096):
        after = density * ratio >> 80
        total, density, ratio = total + density + after, after, ratio * square >> 80
        out.append(total >> 50)
    return np.array(out, np.int64)


@functools.cache
def _powers() -> list[int]:
    """2 ** (k / 8) for k = 0..7 with 40 fractional bits."""
    root = math.isqrt(math.isqrt(math.isqrt(1 << 641)))  # 2**(1/8) with 80 fractional bits
    out = [1 << 80]
    for _ in range(7):
        out.append(out[-1] * root >> 80)
    return [p >> 40 for p in out]


def _power(k: int) -> int:
    """2 ** (k / 8) with 24 fractional bits."""
    shift = k // 8 - 16
    return _powers()[k % 8] << shift if shift >= 0 else _powers()[k % 8] >> -shift


@functools.cache
def _ratios() -> np.ndarray:
    """Borders of the classes, as ratios of a variance."""
    return np.array([_power(2 * k + 1) for k in range(-32, 64)], np.float64) / (1 << 24)


def _gaussian(scale: int, half: int, span: int) -> np.ndarray:
    """Weights of -span..span for a Gaussian of class `scale` centred at half / 2, with a sliver of a wide one."""
    edges = (2 * np.arange(-span, span + 2, dtype=np.int64) - 1 - half) * 128  # in 1/256 steps
    out = np.zeros(2 * span + 1, np.int64)
    for k, weight in ((scale, 2047), (scale + 16, 1)):
        at = np.minimum(abs(edges) * _power(UNIT - k) >> 14, (4095 << 10) + 1023)  # 10 more fractional bits
        whole, part = at >> 10, at & 1023
        area = _normal()[whole] + ((_normal()[whole + 1] - _normal()[whole]) * part >> 10)
        out += np.diff(np.where(edges < 0, -area, area)) * weight
    return out // (int(out.sum()) // (PRIOR * span * TOTAL) + 1)


def _model(weights: np.ndarray) -> Any:
    """Frequencies of sum TOTAL, whose float32 partial sums are all exact; frequency 0 still costs only 24 bits."""
    freq = weights * TOTAL // int(weights.sum())
    freq[freq.argmax()] += TOTAL - int(freq.sum())
    return _coding().model.Categorical(freq.astype(np.float32) / np.float32(TOTAL), perfect=False)


class RangeCoder:
    """Range coder in either direction, with the adaptive tables of one alphabet."""

    def __init__(self, span: int, words: np.ndarray | None) -> None:
        self.span, self.encoder = span, _coding().queue.RangeEncoder() if words is None else None
        self.decoder = None if words is None else _coding().queue.RangeDecoder(words)
        self.tables: dict[int, list] = {}

    def code(self, model: Any, count: int, symbols: np.ndarray | None) -> np.ndarray:
        """`count` symbols of one model: those given are encoded, without any they are decoded."""
        if self.encoder is None:
            return self.decoder.decode(model, count)
        self.encoder.encode(symbols, model)
        return symbols

    def field(self, value: int | None, size: int) -> int:
        """One number below `size`, all equally likely."""
        if size < 2:
            return 0
        if self.encoder is None:
            return int(self.decoder.decode(_coding().model.Uniform(size)))
        self.encoder.encode(int(value), _coding().model.Uniform(size))
        return int(value)

    def bits(self) -> float:
        """Bits written so far."""
        position, (_, width) = self.encoder.pos()
        return 32.0 * position + 64.0 - math.log2(width)

    def adaptive(self, context: int, count: int, symbols: np.ndarray | None) -> np.ndarray:
        """Symbols of one context with its table; contexts are class * 2 + half, or above those flat side tables."""
        table = self.tables.get(context)
        if table is None:
            if context < 2 * CLASSES:
                counts = _gaussian(context >> 1, context & 1, self.span)
            else:
                peak = ROWCLASSES // 2 if context > 2 * CLASSES else 0  # row scales around 1, factors around none
                counts = 8 * TOTAL // (1 + abs(np.arange(ROWCLASSES) - peak))
            table = self.tables[context] = [counts, 0, 0, None]  # weights, symbols seen, next refit, model
        parts, done = [], 0
        while done < count:
            if table[1] >= table[2]:
                table[3] = _model(table[0])
                table[2] = table[1] + table[1] // 4 + 32
            size = min(count - done, table[2] - table[1])
            part = self.code(table[3], size, None if symbols is None else symbols[done:done + size])
            table[0] += np.bincount(part, minlength=len(table[0])) * TOTAL
            parts.append(part)
            done, table[1] = done + size, table[1] + size
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def block(self, contexts: np.ndarray, symbols: np.ndarray | None) -> np.ndarray:
        """Symbols of known contexts (uint8), grouped by context so that each group is one call."""
        counts = np.bincount(contexts)
        used = np.flatnonzero(counts).tolist()
        if len(used) == 1:
            return self.adaptive(used[0], len(contexts), symbols)
        order = np.argsort(contexts, kind="stable")
        wanted = None if symbols is None else symbols[order]
        parts, at = [], 0
        for context in used:
            end = at + int(counts[context])
            parts.append(self.adaptive(context, end - at, None if wanted is None else wanted[at:end]))
            at = end
        if symbols is not None:
            return symbols
        out = np.empty(len(contexts), np.int32)
        out[order] = np.concatenate(parts)
        return out


def _classes(ratio: np.ndarray | float) -> np.ndarray:
    """Eighths of an octave of a standard deviation, from its variance ratio."""
    return np.searchsorted(_ratios(), ratio) - 32


def _matrix(coder: RangeCoder, shape: tuple[int, int], low: int, plan: dict | None) -> np.ndarray:
    """Code one matrix: `plan` has what the encoder decided, None decodes."""
    span, get = coder.span, (plan or {}).get
    kind, turn = coder.field(get("kind"), 3), coder.field(get("turn"), 2)
    rows, columns = shape[::-1] if turn else shape
    centre = coder.field(get("centre"), span + 1)
    energy = coder.field(get("energy"), (1 << 24) - 1) + 1  # mean square of a symbol in 1/256
    coarse, width = coder.field(get("coarse"), 3), coder.field(get("width"), 64)
    scale = np.zeros(columns, np.int64)
    if width:
        scale = (coder.code(_model(_gaussian(width, 0, 31)), columns, get("scale")).astype(np.int64) - 31) << coarse
    share = np.array([_power(2 * k) for k in range(-40, 41)])[scale.clip(-40, 40) + 40]
    scale += int(_classes(energy / 256)) + UNIT
    x = get("x")  # values less the centre
    out = np.empty((rows, columns), np.int32)
    if kind == REFERENCE:
        edges = [*np.unique(_starts(rows, columns)).tolist(), rows]
        for a, b in itertools.pairwise(edges):
            sent = {k: plan[k][a:b] for k in ("beta", "size", "named")} if plan else {}
            beta, named = np.zeros(b - a, np.int32), np.zeros(b - a, np.int32)
            if a > 1:
                beta = coder.adaptive(2 * CLASSES, b - a, sent.get("beta"))
                at = np.flatnonzero(beta)
                named[at] = coder.code(_coding().model.Uniform(a), len(at), sent["named"][at] if plan else None)
            size = coder.block((2 * CLASSES + 1 + np.minimum(beta, BETAS)).astype(np.uint8), sent.get("size"))
            half = (beta[:, None] * out[named] + 2) >> 2  # the prediction in half steps
            guess = (half >> 1).clip(-centre, span - centre)
            context = scale + (2 * size[:, None] - ROWCLASSES)
            context = (context.clip(0, CLASSES - 1) * 2 + (half & 1)).astype(np.uint8).ravel()
            got = coder.block(context, None if x is None else (x[a:b] - guess + span).ravel())
            out[a:b] = got.reshape(b - a, columns) - span + guess
    else:
        squares, sums = np.zeros(rows, np.int64), np.zeros(rows, np.int64)
        left, a = int(share.sum()), 0
        whole, mean = left, energy / 256
        while a < columns:
            b = min(columns, a + max(1, (columns - a) // 8, 512 // rows))
            context = np.broadcast_to(scale[a:b], (rows, b - a))
            if kind == BUDGET and a:
                rest = (mean * columns * columns - (columns * squares - sums * sums)) / (mean * columns * columns)
                trust = (columns - a) / ((columns - a) + columns / (6.0 * mean))
                context = context + _classes(np.maximum(0.3, 1.0 + trust * (rest * (whole / left) - 1.0)))[:, None]
            context = (context.clip(0, CLASSES - 1) * 2).astype(np.uint8).ravel()
            got = coder.block(context, None if x is None else (x[:, a:b] + span).ravel())
            part = out[:, a:b] = got.reshape(rows, b - a) - span
            squares += (part * part).sum(1)
            sums += part.sum(1)
            left, a = left - int(share[a:b].sum()), b
    out += low + centre
    return out.T if turn else out


def _starts(rows: int, columns: int) -> np.ndarray:
    """First row of each row's block: rows refer to earlier blocks only, so blocks start small and grow for speed."""
    out, a = np.zeros(rows, np.int32), 0
    while a < rows:
        b = a + min(max(1, a // 16), max(2, 4096 // columns))
        out[a:b] = a
        a = b
    return out


def _columns(variance: np.ndarray, rows: float) -> tuple[float, int, int, np.ndarray]:
    """Cheapest classes of the columns (relative variances): bits against none, coarseness, width, classes + 31."""
    best = (0.0, 0, 0, np.zeros(len(variance), np.int32))
    if rows < 8:
        return best
    grid = np.arange(-31, 32)
    plain = rows / 2 * variance.sum() / math.log(2)
    for coarse in range(3):
        ratio = 2.0 ** ((grid << coarse).clip(-40, 40) / 4)
        spread = np.log2(variance.clip(1e-3, 1e3)) * 4 / (1 << coarse)
        for shrink in (1.0, 0.7, 0.45):
            width = int(round(UNIT + 8 * math.log2(max(0.13, float(spread.std()) * shrink))))
            width = min(63, max(1, width))
            freq = _gaussian(width, 0, 31)
            freq = freq / freq.sum()
            side = -np.log2(freq.clip(2.0**-24, 1))
            cost = side[:, None] + rows / 2 * (np.log2(ratio)[:, None] + variance / ratio[:, None] / math.log(2))
            pick = cost.argmin(0)
            bits = float(cost[pick, np.arange(len(pick))].sum()) - plain
            if bits < best[0]:
                best = (bits, coarse, width, pick.astype(np.int32))
    return best


def _plan(matrix: np.ndarray, low: int, span: int, kinds: tuple[int, ...]) -> dict:
    """Decide how to code a matrix, by Gaussian estimates of what each kind would save."""
    centre = min(span, max(0, int(round(float(matrix.mean()))) - low))
    x = matrix.astype(np.int32) - (low + centre)
    best: dict = {"bits": math.inf}
    for turn in ((0, 1) if min(x.shape) > 1 else (int(x.shape[1] == 1),)):
        y = x.T if turn else x
        rows, columns = y.shape
        square = (y * y).astype(np.float64)
        mean = max(float(square.mean()), 1 / 256)
        energy = square.mean(0)
        expected = float(square.var(0).sum()) + 1e-9  # variance of a row's energy if its symbols are independent
        kind, tails = FLAT, min(1.0, 2 * float((energy * energy).sum()) / expected)  # heavy tails: energies tell less
        bits, coarse, width, scale = _columns(energy / mean, rows * tails)
        if columns > 8 and rows > 8:
            budget = square.sum(1) - y.sum(1) ** 2.0 / columns
            noise = max(float(budget.var()), mean * columns / 3)
            gain = rows / 2 * math.log2(expected / noise) - 3 * math.sqrt(rows)
            if gain > 0 and BUDGET in kinds:
                kind, bits, mean = BUDGET, bits - gain, float(budget.mean()) / columns
        if bits < best["bits"]:
            best = {"bits": bits, "kind": kind, "turn": turn, "coarse": coarse, "width": width, "scale": scale,
                    "x": y, "energy": max(0, round(mean * 256) - 1)}
    if REFERENCE in kinds and x.shape[0] > 32 and x.shape[1] > 15:
        refer = _refer(x)
        if refer and refer["bits"] < best["bits"]:
            best = refer
    return best | {"centre": centre}


def _entropy(values: np.ndarray) -> float:
    """Bits of all values at their own frequencies."""
    counts = np.unique(values, return_counts=True)[1]
    return float((counts * np.log2(len(values) / counts)).sum())


def _refer(x: np.ndarray) -> dict | None:
    """Name for each row the earlier row that predicts it best."""
    rows, columns = x.shape
    start = _starts(rows, columns)
    f = x.astype(np.float32)
    norm = np.sqrt(np.einsum("ij,ij->i", f, f) + np.float32(1e-3))
    f /= norm[:, None]
    named, beta = np.zeros(rows, np.int32), np.zeros(rows, np.int32)
    probe = np.arange(1, rows, max(1, rows // 64))  # a glance first: most matrices have no rows that resemble
    slabs = [probe] + [np.arange(a, min(rows, a + 512)) for a in range(0, rows, 512)]
    for n, slab in enumerate(slabs):
        first, last = int(start[slab[0]]), int(slab[-1])
        alike = f[slab] @ f[:last + 1].T
        alike[:, first:][np.arange(first, last + 1) >= start[slab][:, None]] = -1
        pick = alike.argmax(1)
        close = alike[np.arange(len(slab)), pick].clip(0, 1)
        gain = -columns / 2 * np.log2(1.003 - close**2)
        if n == 0 and (gain - 11).clip(0).sum() < len(slab) / 2:
            return None
        factor = np.round(8 * close * norm[slab] / norm[pick]).clip(0, BETAS - 1).astype(np.int32)
        good = (gain > np.log2(slab + 1.0) + 4) & (start[slab] > 1)
        named[slab], beta[slab] = pick, np.where(good, factor, 0)
    if (beta > 0).mean() < 0.05:  # row scales alone are cheaper as the column classes of the turned matrix
        return None
    rest = (x - np.where(beta[:, None] > 0, (beta[:, None] * x[named] + 2) >> 2, 0) / 2.0) ** 2
    mean = max(float(rest.mean()), 1 / 256)
    size = np.round(4 * np.log2(np.sqrt((rest.mean(1) + 0.01) / mean))).clip(-24, 23).astype(np.int32)
    bits, coarse, width, scale = _columns((rest / (2.0 ** (size[:, None] / 2))).mean(0) / mean, rows)
    bits += float(np.log2(np.arange(rows) + 1.0)[beta > 0].sum()) + _entropy(beta * 64 + size) + 200
    bits += columns / 2 * float((size / 2.0 + math.log2(mean / float((x * x).mean()))).sum())
    return {"bits": bits, "kind": REFERENCE, "turn": 0, "coarse": coarse, "width": width, "scale": scale, "x": x,
            "energy": max(0, round(mean * 256) - 1), "beta": beta, "size": size + ROWCLASSES // 2, "named": named}


def _pack_range(matrices: Matrices, kinds: tuple[int, ...]) -> tuple[bytes, list[float]]:
    filled = [m for m in matrices if m.size]
    low = min((int(m.min()) for m in filled), default=0)
    span = max((int(m.max()) for m in filled), default=0) - low
    if not span:
        return bytes([low & 255, low & 255]) if filled else b"", [0.0] * len(matrices)
    coder, bits = RangeCoder(span, None), [0.0]
    for m in matrices:
        if m.size:
            _matrix(coder, m.shape, low, _plan(m, low, span, kinds))
        bits.append(coder.bits())
    words = coder.encoder.get_compressed().astype(">u4").tobytes().rstrip(b"\0")
    return bytes([low & 255, low + span & 255]) + words, [b - a for a, b in itertools.pairwise(bits)]


def unpack_range(blob: bytes, shapes: Shapes, low: int, high: int) -> Matrices:
    """The matrices of a range-coded stream; ValueError for damage."""
    if not _count(shapes):
        return [np.zeros(shape, np.int8) for shape in shapes]
    if len(blob) < 2:
        raise ValueError("a range-coded stream begins with its smallest and largest symbol")
    first, last = np.frombuffer(blob[:2], np.int8).tolist()
    if first > last:
        raise ValueError("the smallest symbol is larger than the largest")
    if first == last:
        return [np.full(shape, first, np.int8) for shape in shapes]
    words = np.frombuffer(blob[2:] + bytes(-(len(blob) - 2) % 4), ">u4").astype(np.uint32)
    coder, out = RangeCoder(last - first, words), []
    for shape in shapes:
        matrix = _matrix(coder, shape, first, None) if shape[0] * shape[1] else np.zeros(shape, np.int32)
        if matrix.size and (matrix.min() < first or matrix.max() > last):
            raise ValueError(f"a symbol outside {first}..{last}")
        out.append(np.ascontiguousarray(matrix, np.int8))
    return out


def pack_context(matrices: Matrices, low: int, high: int) -> tuple[bytes, list[float]]:
    """All matrices as one stream with every context that pays; also the bits spent on each."""
    return _pack_range(matrices, (FLAT, BUDGET, REFERENCE))


def pack_static(matrices: Matrices, low: int, high: int) -> tuple[bytes, list[float]]:
    """The same with contexts known beforehand only, the classes of the columns: faster."""
    return _pack_range(matrices, (FLAT,))


# -- all codecs


class Codec(NamedTuple):
    """A lossless coder of matrices of symbols low..high: pack -> (blob, bits spent on each matrix or None), unpack
    (raises ValueError for anything damaged), and what it needs: a Python package, or a program."""
    pack: Callable[[Matrices, int, int], tuple[bytes, list[float] | None]]
    unpack: Callable[[bytes, Shapes, int, int], Matrices]
    needs: str


def _byte_codec(compress: Callable[[bytes], bytes], decompress: Callable[[bytes, int], bytes], needs: str) -> Codec:
    return Codec(functools.partial(pack_bytes, compress=compress),
                 functools.partial(unpack_bytes, decompress=decompress), needs)


CODECS: dict[str, Codec] = {
    "context": Codec(pack_context, unpack_range, "constriction"),
    "range": Codec(pack_static, unpack_range, "constriction"),
    "zlib": _byte_codec(functools.partial(zlib.compress, level=9), zlib_decompress, "zlib"),
    "lzma": _byte_codec(lzma_compress, lzma_decompress, "lzma"),
    "zstd": _byte_codec(zstd_compress, zstd_decompress, "zstandard"),
    "brotli": _byte_codec(brotli_compress, brotli_decompress, "brotli"),
    "zpaq": _byte_codec(zpaq_compress, zpaq_decompress, "zpaq"),
    "lrzip": _byte_codec(lrzip_compress, lrzip_decompress, "program lrzip"),
}


def codec_there(name: str) -> bool:
    """Whether what a codec needs is installed."""
    kind, _, program = CODECS[name].needs.rpartition(" ")
    return shutil.which(program) is not None if kind else importlib.util.find_spec(program) is not None


def pick_codecs(choice: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """Names of the codecs to try, and names of those `auto` has to do without. A named one must be there."""
    if choice == ("auto",):
        there = [name for name in AUTO_CODECS if codec_there(name)]
        return there, [name for name in AUTO_CODECS if name not in there]
    for name in choice:
        if not codec_there(name):
            what = CODECS[name].needs
            raise ConfigError(f"CODEC={name}: needs the {what if ' ' in what else f'Python package {what}'}, which is "
                              "not installed")
    return list(choice), []


def entropy_bits(symbols: np.ndarray) -> float:
    """Zeroth-order entropy of all symbols together, in bits."""
    counts = np.bincount(symbols.ravel().astype(np.int16) + 128)
    counts = counts[counts > 0]
    return float(-(counts * np.log2(counts / counts.sum())).sum())


def pack_stream(matrices: Matrices, low: int, high: int, names: list[str]) -> tuple[str, bytes, list[float]]:
    """The smallest packing of a stream: its codec, its bytes, and the bits of each matrix (by entropy, where the codec
    cannot say). A sample picks what a long stream goes through: the best codec of it, and the next one where that is
    less than a hundredth worse. Ties go to the earlier name."""
    if len(names) > 1 and _count([matrix.shape for matrix in matrices]) > SAMPLE_SYMBOLS:
        sample = _sample(matrices)
        sizes = {name: len(CODECS[name].pack(sample, low, high)[0]) for name in names}
        names = sorted(names, key=sizes.__getitem__)[:2]
        names = [name for name in names if sizes[name] <= 1.01 * sizes[names[0]]]
    packed = [(name, *CODECS[name].pack(matrices, low, high)) for name in names]
    name, blob, bits = min(packed, key=lambda row: len(row[1]))
    if bits is None:
        shares = [entropy_bits(matrix) + 1e-9 for matrix in matrices]
        bits = [8 * len(blob) * share / sum(shares) for share in shares]
    return name, blob, bits


def unpack_stream(name: str, blob: bytes, shapes: Shapes, low: int, high: int) -> Matrices:
    """The matrices of a stream, or ValueError."""
    try:
        matrices = CODECS[name].unpack(blob, shapes, low, high)
    except (KeyError, IndexError, TypeError, OverflowError, struct.error, zlib.error, lzma.LZMAError, OSError,
            ArithmeticError, AssertionError, RuntimeError) as error:
        raise ValueError(f"{name}: {error}") from None
    if any(matrix.shape != tuple(shape) or (matrix.size and (matrix.min() < low or matrix.max() > high))
           for matrix, shape in zip(matrices, shapes, strict=True)):
        raise ValueError(f"{name}: a symbol outside {low}..{high}")
    return matrices


# -- the container


class Stored(NamedTuple):
    """A tensor on its way into the container: its route, shape and codes, and the name of the tensor that it corrects
    (a pair of such factors, left and right, is added to that tensor), or "" for a tensor of its own."""
    route: Route
    shape: tuple[int, ...]
    coded: Coded
    corrects: str = ""


class Part(NamedTuple):
    """One matrix of symbols: its stream, its shape, the range of its symbols."""
    stream: str
    shape: tuple[int, int]
    low: int
    high: int


def parts_of(route: Route, shape: tuple[int, ...]) -> dict[str, Part]:
    """The matrices a tensor is stored as, by the name of the field of Coded, in order. Reader and writer both ask
    here."""
    form, count = FORMATS[route.format], math.prod(shape)
    rows = 1 if len(shape) < 2 else shape[0]
    columns = count // rows if rows else 0
    if form.bits == 16:
        return {half: Part(f"{route.format} {half}", (rows, columns), -128, 127) for half in ("low", "high")}
    across = -(-columns // 4) if route.format == "sherry" else columns
    low, high, name = form.low, form.high, route.format
    if route.fine[2]:
        low, high, name = -127, 127, f"{name} fine"
    parts = {"codes": Part(name, (rows, across), low, high)}
    if route.format == "fp8":
        return parts
    groups = group_count(4 * across if route.format == "sherry" else columns, route.group)
    parts["levels"] = Part("levels", (rows, 1), 0, 127)
    if groups > 1:
        parts["groups"] = Part("groups", (rows, groups), -127, 127)
    if route.format.startswith("uint"):
        parts["zeros"] = Part("zeros", (rows, groups), -128, 127)
    return parts


def matrices_of(coded: Coded) -> dict[str, np.ndarray]:
    """The int8 matrices of a coded tensor by the names that parts_of gives them."""
    codes = coded.codes.cpu().numpy()
    if codes.dtype == np.int16:
        halves = np.ascontiguousarray(codes).view(np.uint8).reshape(*codes.shape, 2)
        return {"low": (halves[..., 0] ^ 128).view(np.int8), "high": (halves[..., 1] ^ 128).view(np.int8)}
    return {"codes": codes, **{name: side.cpu().numpy() for name, side in coded.sides.items()}}


def coded_from(matrices: dict[str, np.ndarray], unit: float, ratio: float) -> Coded:
    """The inverse of matrices_of."""
    if "high" in matrices:
        halves = np.stack([matrices["low"].view(np.uint8) ^ 128, matrices["high"].view(np.uint8) ^ 128], -1)
        return Coded(torch.from_numpy(halves.view(np.int16)[..., 0].copy()), {}, unit, ratio)
    held = {name: torch.from_numpy(np.ascontiguousarray(matrix)) for name, matrix in matrices.items()}
    return Coded(held.pop("codes"), held, unit, ratio)


class Entry(NamedTuple):
    """What a tensor took: the row printed for it and written to events.jsonl. Costs are in nats a token, by the second
    moments of calibration; nan without one."""
    name: str
    role: str
    format: str
    solver: str
    codec: str
    weights: int
    bytes: float
    scale_bytes: float
    error: float
    hessian_error: float
    cost: float


def pack_artifact(stored: Mapping[str, Stored], facts: dict[str, Any], codecs: list[str]
                  ) -> tuple[bytes, dict[str, tuple[str, float, float]]]:
    """The artifact's bytes, and for every tensor its codec, its bytes and those of them that are scales. `facts` is
    what a reader needs to rebuild the model."""
    streams: dict[str, list[tuple[str, str, Part, np.ndarray]]] = {}
    rows = []
    for name, (route, shape, coded, corrects) in stored.items():
        own = "" if route.codec == "auto" else f" {route.codec}"
        matrices = matrices_of(coded)
        for field, part in parts_of(route, shape).items():
            streams.setdefault(part.stream + own, []).append((name, field, part, matrices[field]))
        rows.append([name, route.format, list(shape), route.group, list(route.fine), coded.unit, coded.ratio, own,
                     corrects])
    blobs, table, found = [], [], {name: ["", 0.0, 0.0] for name in stored}
    for key, members in streams.items():
        own = CODECS.keys() & {key.rpartition(" ")[2]}
        part = members[0][2]
        codec, blob, bits = pack_stream([matrix for *_, matrix in members], part.low, part.high,
                                        list(own) or codecs)
        table.append([key, codec, len(blob)])
        blobs.append(blob)
        for (name, field, *_), spent in zip(members, bits, strict=True):
            held = found[name]
            held[0] = held[0] if field in FIELDS_OF_SCALES else codec
            held[2 if field in FIELDS_OF_SCALES else 1] += spent / 8
    symbols = sum(matrix.size for members in streams.values() for *_, matrix in members)
    padding = max(0, -(-(symbols - WEIGHTS_FREE) // WEIGHTS_PER_BYTE) - sum(map(len, blobs)))
    header = zlib.compress(json.dumps({**facts, "tensors": rows, "streams": table, "padding": padding}, sort_keys=True,
                                      separators=(",", ":")).encode(), 9)
    body = b"".join([MAGIC, struct.pack("<HI", CONTAINER_VERSION, len(header)), header, *blobs, bytes(padding)])
    return body + hashlib.sha256(body).digest(), {name: (codec, own + sides, sides)
                                                  for name, (codec, own, sides) in found.items()}


FIELDS_OF_SCALES = ("levels", "groups", "zeros")


def _parse_header(data: bytes) -> tuple[dict[str, Any], int]:
    """The header as a dict and the offset of the first stream; ValueError naming what is wrong."""
    fixed = len(MAGIC) + struct.calcsize("<HI")
    if len(data) < fixed + 32 or data[:len(MAGIC)] != MAGIC:
        raise ValueError("not an artifact of this project, or truncated")
    version, length = struct.unpack_from("<HI", data, len(MAGIC))
    if version != CONTAINER_VERSION:
        raise ValueError(f"container version {version}, this script reads {CONTAINER_VERSION}")
    if hashlib.sha256(data[:-32]).digest() != data[-32:]:
        raise ValueError("the checksum does not match: the file is damaged or truncated")
    if fixed + length + 32 > len(data):
        raise ValueError(f"a header of {length} bytes does not fit the file")
    decoder = zlib.decompressobj()
    raw = decoder.decompress(data[fixed:fixed + length], HEADER_LIMIT_BYTES)
    if not decoder.eof:
        raise ValueError(f"the header is longer than {HEADER_LIMIT_BYTES} bytes, or cut off")
    header = json.loads(raw)
    if not isinstance(header, dict) or not all(isinstance(header.get(key), list) for key in ("tensors", "streams")):
        raise ValueError("the header is not a list of tensors and a list of streams")
    return header, fixed + length


def _parse_row(row: Any) -> tuple[str, Route, tuple[int, ...], float, float, str, str]:
    """One tensor of the header, every field checked."""
    name, kind, shape, group, fine, unit, ratio, own, corrects = row
    sizes = [group, *shape, *fine]
    if (not all(isinstance(text, str) for text in (name, own, corrects)) or kind not in FORMATS or len(fine) != 3
            or any(type(size) is not int or not 0 <= size < 1 << 31 for size in sizes) or len(shape) > 4
            or type(unit) is not float or type(ratio) is not float or not 1 <= ratio < 2
            or not 0 < unit * ratio ** SCALE_LEVELS < 1e30 or fine[2] not in (0, *range(3, 9))
            or (fine[2] and not kind.startswith("int"))):
        raise ValueError(f"tensor {str(name)[:60]!r}: impossible header entry")
    return name, Route(kind, group, fine=tuple(fine)), tuple(shape), unit, ratio, own, corrects


def _parse_streams(rows: list[Any], table: list[Any], padding: int, at: int, data: bytes
                   ) -> dict[str, tuple[str, bytes, list[Part]]]:
    """Stream -> (codec, bytes, its parts in order); ValueError unless streams, tensors and file agree."""
    parts: dict[str, list[Part]] = {}
    for _, route, shape, _, _, own, _ in rows:
        for part in parts_of(route, shape).values():
            parts.setdefault(part.stream + own, []).append(part)
    declared = sum(_count([part.shape for part in members]) for members in parts.values())
    if declared > WEIGHTS_PER_BYTE * len(data) + WEIGHTS_FREE:
        raise ValueError(f"{declared} symbols are declared, {len(data)} bytes cannot hold them")
    streams = {}
    for key, codec, length in table:
        if key not in parts or key in streams or codec not in CODECS or type(length) is not int or length < 0:
            raise ValueError(f"stream {str(key)[:60]!r}: impossible header entry")
        if at + length + 32 > len(data):
            raise ValueError(f"stream {key!r}: its {length} bytes do not fit the file")
        streams[key] = (codec, data[at:at + length], parts[key])
        at += length
    if len(streams) != len(parts):
        raise ValueError(f"stream {min(set(parts) - set(streams))!r} is missing")
    if type(padding) is not int or at + padding + 32 != len(data) or any(data[at:-32]):
        raise ValueError(f"{len(data) - at - 32} bytes belong to no stream")
    return streams


def unpack_artifact(data: bytes) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(facts, name -> fp32 tensor) of an artifact's bytes; ValueError, in one line, for anything damaged."""
    try:
        header, at = _parse_header(data)
        rows = [_parse_row(row) for row in header.pop("tensors")]
        if len({row[0] for row in rows}) != len(rows):
            raise ValueError("a tensor stands there twice")
        streams = _parse_streams(rows, header.pop("streams"), header.pop("padding", 0), at, data)
        matrices = {key: iter(unpack_stream(codec, blob, [part.shape for part in parts], parts[0].low, parts[0].high))
                    for key, (codec, blob, parts) in streams.items()}
        weights: dict[str, Tensor] = {}
        factors: dict[str, list[Tensor]] = {}
        for name, route, shape, unit, ratio, own, corrects in rows:
            held = {field: next(matrices[part.stream + own]) for field, part in parts_of(route, shape).items()}
            tensor = FORMATS[route.format].decode(coded_from(held, unit, ratio), route, shape)
            if corrects:
                factors.setdefault(corrects, []).append(tensor)
            else:
                weights[name] = tensor
        for name, pair in factors.items():
            weights[name] = corrected(weights[name], *pair)
        return header, weights
    except (KeyError, TypeError, IndexError, StopIteration, struct.error, zlib.error, UnicodeDecodeError,
            RecursionError, ArithmeticError, RuntimeError) as error:
        raise ValueError(f"damaged: {type(error).__name__} {' '.join(str(error).split())[:200]}") from None


def corrected(weight: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """weight (R, C) + left^T right, left (r, R), right (r, C), rank by rank in single products and sums: the same bits
    on every machine."""
    if (weight.ndim != 2 or left.shape != (len(right), len(weight)) or right.shape[1:] != weight.shape[1:]
            or len(right) > min(weight.shape)):
        raise ValueError(f"a correction of {tuple(left.shape)} x {tuple(right.shape)} for {tuple(weight.shape)}")
    for column, row in zip(left, right, strict=True):
        weight = weight + column[:, None] * row
    return weight


def save_artifact(path: Path, data: bytes) -> None:
    """Write the artifact atomically and read it back: what is on disk is what was counted."""
    write_atomic(path, data)
    if path.read_bytes() != data:
        raise CheckError(f"{path}: reading back gave other bytes; the disk is not reliable")


def load_artifact(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(facts, weights) of the artifact at `path`; ConfigError when it is absent or damaged."""
    try:
        return unpack_artifact(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"RUN_ID={path.parent.name}: no artifact at {path} ({error.strerror})") from None
    except (ValueError, MemoryError) as error:
        raise ConfigError(f"RUN_ID={path.parent.name}: {path}: {error}") from None


def artifact_facts(settings: ModelSettings, vocab_size: int, tokenizer_sha256: str, grammar: np.ndarray | None = None
                   ) -> dict[str, Any]:
    """What the header says besides the tensors: enough to rebuild the model and to refuse another tokenizer; Grammar's
    facts (V, F) of a model that has it."""
    return {"model": dataclasses.asdict(settings), "vocab_size": vocab_size, "tokenizer_sha256": tokenizer_sha256,
            **({} if grammar is None else {"grammar": ENDINGS["grammar"].write(grammar)})}


def make_model_from(facts: dict[str, Any], weights: Mapping[str, Tensor], kernels: Picked, dtype: torch.dtype,
                    path: Path) -> GPT:
    """The model an artifact describes, with its weights; ConfigError when header and tensors disagree. The shapes are
    compared before anything of the described size is made."""
    what = f"RUN_ID={path.parent.name}: {path}"
    try:
        settings = ModelSettings(**{name: parse_value(name.upper(), value) for name, value in facts["model"].items()})
        vocab_size = parse_value("VOCAB_SIZE", facts["vocab_size"])
        check_heads(settings)
        with torch.device("meta"):
            load_weights(GPT(settings, vocab_size, kernels, dtype), weights, what, check_only=True)
        grammar = ENDINGS["grammar"].read(facts["grammar"], vocab_size) if settings.grammar_bias else None
        if "grammar" in facts and grammar is None:
            raise ValueError("grammar: the model has none")
    except (ConfigError, KeyError, TypeError, ValueError, AttributeError, RuntimeError, ArithmeticError) as error:
        if isinstance(error, ConfigError) and str(error).startswith(what):
            raise
        raise ConfigError(f"{what}: the header describes no model ({str(error).splitlines()[0]})") from None
    model = GPT(settings, vocab_size, kernels, dtype)
    load_weights(model, weights, what)
    if grammar is not None:
        model.grammar.facts.copy_(torch.from_numpy(grammar))
    return model


# -- calibration: what goes into every matrix, and what its output's errors cost


class Calibration(NamedTuple):
    """Second moments over `tokens` positions, by site: `inputs` sum x x^T (C, C), `slopes` sum of the squared gradient
    of the loss at the site's output (R,), both fp32. The lookup of the embedding, site `embed`, has its row as output:
    there `inputs` is the sum of g g^T and `slopes` how often each row was looked up, in units that add to the
    head's."""
    inputs: dict[str, Tensor]
    slopes: dict[str, Tensor]
    tokens: int


def weight_sites(model: GPT) -> dict[str, list[str]]:
    """Matrix -> the sites where the last phase of the plan uses it, one a visit; the tied embedding's are head and
    embed."""
    sites: dict[str, list[str]] = {"tok_emb": ["head", "embed"]}
    sites |= {f"{name}.weight": [name] for name, module in model.named_modules()
              if isinstance(module, Linear) and not name.startswith("blocks.")}
    for step in model.phases[-1].steps:
        for name, module in model.blocks[step.block].named_modules():
            if isinstance(module, Linear):
                site = name.rpartition(".")[2] + "".join(filter(str.isdigit, name.split(".")))  # of experts with number
                sites.setdefault(f"blocks.{step.block}.{name}.weight", []).append(f"v{step.visit}.{site}")
    return sites


def watch_batch(model: GPT, forward: Callable[..., Tensor], batch: Batch, sites: Iterable[str]) -> Calibration:
    """The moments of one batch at the given sites, through the one forward and its backward."""
    inputs: dict[str, Tensor] = {}
    slopes: dict[str, Tensor] = {}

    def add(held: dict[str, Tensor], site: str, part: Tensor) -> None:
        held[site] = held[site] + part if site in held else part

    def tap(site: str) -> Callable[[Tensor, Tensor], Tensor]:
        def watch(y: Tensor, x: Tensor) -> Tensor:
            rows = x.detach().flatten(0, -2).float()
            add(inputs, site, rows.mT @ rows)
            y.register_hook(lambda grad: add(slopes, site, grad.float().flatten(0, -2).square().sum(0)))
            return y
        return watch

    def watch_lookup(y: Tensor, x: Tensor) -> Tensor:
        def add_grad(grad: Tensor) -> None:
            rows = grad.float().flatten(0, -2)
            add(inputs, "embed", rows.mT @ rows)
        y.register_hook(add_grad)
        slopes["embed"] = torch.bincount(batch.tokens.flatten(), minlength=len(model.tok_emb)).float()
        return y

    taps = {site: tap(site) if site != "embed" else watch_lookup for site in sites}
    with torch.enable_grad():
        final = forward(batch.tokens, batch.docs, taps)
        hidden = final.detach().flatten(0, 1).requires_grad_()
        targets, slope = batch.targets.flatten(), torch.zeros_like(hidden)
        for start in range(0, len(targets), HEAD_ROWS):
            rows = slice(start, start + HEAD_ROWS)
            nats = F.cross_entropy(model.logits(hidden[rows], taps), targets[rows], reduction="sum")
            slope += torch.autograd.grad(nats, hidden)[0]
        # Towards embedding and tables every site is passed, and no gradient of a matrix has to be made.
        tables = [part for part in model.parameters() if part.role in ("embedding", "table")]
        torch.autograd.grad(final, tables, slope.view_as(final))
    return Calibration(inputs, slopes, batch.tokens.numel())


def calibrate(model: GPT, batches: Callable[[int], Batch], count: int, world: World, sites: list[str]) -> Calibration:
    """The moments over micro-batches 0 .. count - 1, divided over ranks and lanes and summed over all of them."""
    forward = make_forward(model, len(model.phases) - 1)
    found: Calibration | None = None
    mine = range(world.rank, count, world.size)
    if not mine:
        # A rank without work still has to know the shapes that it adds nothing to.
        shapes = watch_batch(model, forward, batches(0), sites)
        found = Calibration(*({site: torch.zeros_like(part) for site, part in held.items()} for held in shapes[:2]), 0)
    for start in range(0, len(mine), world.lanes):
        for part in world.each(lambda batch: watch_batch(model, forward, batch, sites),
                               [batches(index) for index in mine[start:start + world.lanes]]):
            if found is None:
                found = part
                continue
            for held, more in ((found.inputs, part.inputs), (found.slopes, part.slopes)):
                for site, tensor in more.items():
                    held[site] += tensor
            found = found._replace(tokens=found.tokens + part.tokens)
    for held in (found.inputs, found.slopes):
        for site in sites:
            world.add_(held[site])
    found = found._replace(tokens=sum(world.gather(found.tokens)))
    if "embed" in sites:
        # A row's error e costs 1/2 e (slope * H / T + count * G / T) e^T / T; in the head's units G weighs T /
        # sum(slope).
        weight = found.tokens / found.slopes["head"].sum()
        found.inputs["embed"] *= weight
        found.slopes["embed"] /= weight
    return found


def sample_text(model: GPT, index: int, rows: int, length: int, seed: int, world: World) -> Batch:
    """Rows the model writes itself, each from BOS at temperature 1: calibration without any training text."""
    forward = make_forward(model, len(model.phases) - 1)
    generator = torch.Generator(world.device).manual_seed(stream_seed(seed, "self-calibration", index))
    tokens = torch.full((rows, 1), BOS, device=world.device)
    with torch.inference_mode():
        while tokens.shape[1] <= length:
            hidden = forward(tokens, document_index(tokens))[:, -1]
            chance = model.logits(hidden).softmax(-1)
            tokens = torch.cat([tokens, torch.multinomial(chance, 1, generator=generator)], 1)
    tokens = tokens.clone()
    return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), document_index(tokens[:, :-1]))


def moments_of(calibration: Calibration | None, sites: list[str]) -> Tensor | None:
    """The Hessian of a matrix: the sum of its inputs' moments over all its visits. None where nothing was seen."""
    if calibration is None or not sites or sites[0] not in calibration.inputs:
        return None
    return sum((calibration.inputs[site] for site in sites[1:]), calibration.inputs[sites[0]])


def error_costs(error: Tensor, weight: Tensor, calibration: Calibration | None, sites: list[str]
                ) -> tuple[float, dict[str, float]]:
    """What a weight error (R, C) costs in nats a token, by the expected curvature 1/2 sum_r E[g_r^2] e_r E[x x^T] e_r^T
    summed over visits; and by visit the output error relative to the output."""
    if moments_of(calibration, sites) is None:
        return math.nan, {}
    cost, visits = 0.0, {}
    for site in sites:
        moment = calibration.inputs[site].to(error.dtype)
        each = ((error @ moment) * error).sum(1)
        cost += 0.5 * float((each * calibration.slopes[site].to(error.dtype)).sum()) / calibration.tokens ** 2
        visits[site] = math.sqrt(max(0.0, float(each.sum())) / max(1e-30, float(((weight @ moment) * weight).sum())))
    return cost, visits


# -- the squeeze


class Solved(NamedTuple):
    """A tensor as it will be stored, its relative error, the loss proxy in nats a token, and its output error by
    visit."""
    stored: Stored
    error: float
    cost: float
    visits: dict[str, float]
    decoded: Tensor


def solve_tensor(name: str, weight: Tensor, route: Route, calibration: Calibration | None, sites: list[str],
                 settings: ArtifactSettings) -> Solved:
    """One tensor through its solver, with its errors."""
    if not torch.isfinite(weight).all():
        raise CheckError(f"{name} holds values that are not finite; nothing was written")
    try:
        coded = solve(weight, route, moments_of(calibration, sites), settings)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from None
    decoded = FORMATS[route.format].decode(coded, route, tuple(weight.shape))
    error = as_rows(decoded - weight).double()
    cost, visits = error_costs(error, as_rows(weight).double(), calibration, sites)
    relative = float(error.norm() / weight.double().norm().clamp_min(1e-30))
    return Solved(Stored(route, tuple(weight.shape), coded), relative, cost, visits, decoded)


def solve_all(weights: Mapping[str, Tensor], routes: Mapping[str, Route], calibration: Calibration | None,
              sites: Mapping[str, list[str]], settings: ArtifactSettings, world: World) -> dict[str, Solved]:
    """Every tensor, solved: divided over ranks and lanes by the solver's work, gathered on all ranks, on the CPU."""
    costs = {name: weight.numel() * (1 + weight.shape[-1] * (routes[name].solver != "nearest"))
             for name, weight in weights.items()}
    owners = share_out(costs, world.size)
    mine = [name for name in sorted(weights, key=lambda name: -costs[name]) if owners[name] == world.rank]
    found = world.each(lambda name: solve_tensor(name, weights[name], routes[name], calibration, sites.get(name, []),
                                                 settings), mine)
    own = {name: solved._replace(stored=solved.stored._replace(
        route=solved.stored.route._replace(steps=None), coded=Coded(
            solved.stored.coded.codes.cpu(), {key: side.cpu() for key, side in solved.stored.coded.sides.items()},
            *solved.stored.coded[2:])), decoded=solved.decoded.cpu()) for name, solved in zip(mine, found, strict=True)}
    everyone = {name: solved for part in world.gather(own) for name, solved in part.items()}
    return {name: everyone[name] for name in weights}


def add_fine_columns(weights: Mapping[str, Tensor], routes: Mapping[str, Route], calibration: Calibration,
                     sites: Mapping[str, list[str]], settings: ArtifactSettings) -> dict[str, Route]:
    """The routes with a finer grid for the AWQ_LITE_GROUP_TOP_K groups of columns, over all matrices, whose inputs
    times weights are largest: sum over columns of rms(x_j) * mean|W_rj|. Source: AWQ-lite, PR 1908."""
    size, scores = settings.awq_lite_group_size, []
    for name, route in routes.items():
        moment = moments_of(calibration, sites.get(name, []))
        if moment is None or not route.format.startswith("int") or weights[name].shape[1] < size:
            continue
        column = (moment.diagonal() / calibration.tokens).sqrt() * weights[name].to(moment.device).abs().mean(0)
        for start in range(0, len(column) - size + 1, size):
            scores.append((-float(column[start:start + size].sum()), name, start))
    chosen: dict[str, Route] = {}
    for _, name, start in sorted(scores):
        if len(chosen) < settings.awq_lite_group_top_k and name not in chosen:
            chosen[name] = routes[name]._replace(fine=(start, start + size, settings.awq_lite_bits))
    return {**routes, **chosen}


LEFT_FACTOR, RIGHT_FACTOR = Route("uint2"), Route("int4")


def top_factors(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The largest singular values (r,) of a matrix (R, C) with their vectors, (R, r) and (r, C), from the eigenvectors
    of the smaller of its two products with itself: for a few factors much faster than all of them."""
    wide = matrix.shape[0] <= matrix.shape[1]
    values, vectors = torch.linalg.eigh(matrix @ matrix.mT if wide else matrix.mT @ matrix)
    floor = float(values[-1].clamp_min(1e-200)) * 1e-16  # below it is rounding
    s, vectors = values[-rank:].flip(0).clamp_min(floor).sqrt(), vectors[:, -rank:].flip(1)
    other = (vectors.mT @ matrix if wide else matrix @ vectors) / (s[:, None] if wide else s)
    return (s, vectors, other) if wide else (s, other, vectors.mT)


def correct_errors(weights: Mapping[str, Tensor], solved: dict[str, Solved], calibration: Calibration,
                   sites: Mapping[str, list[str]], settings: ArtifactSettings) -> dict[str, Stored]:
    """The low-rank factors of the quantization errors that remove most of the cost a byte, LQER_TOP_K pairs at most.

    The factors are those of E L, L being the Hessian's Cholesky factor, so that the singular values are output errors;
    the left one is stored with two bits and a zero point, the right one with four bits and a scale a group. The gain
    is measured with the factors as stored; a pair without gain is not taken. Source: LQER, arXiv 2402.02446.
    """
    left_route, right_route = LEFT_FACTOR, RIGHT_FACTOR._replace(group=settings.lqer_asym_group)
    found = []
    for name, row in solved.items():
        moment = moments_of(calibration, sites.get(name, []))
        if moment is None or not moment.any() or min(weights[name].shape) <= settings.lqer_rank or math.isnan(row.cost):
            continue
        weight, moment = weights[name].double(), moment.double()
        moment = moment + settings.gptq_damping * moment.diagonal().mean() * torch.eye(len(moment)).to(moment)
        lower = torch.linalg.cholesky(moment)
        s, u, vt = top_factors((weight - row.decoded.to(weight)) @ lower, settings.lqer_rank)
        left = (u * s.sqrt()).T.float().cpu().contiguous()  # (r, R)
        right = torch.linalg.solve_triangular(lower.T, (s.sqrt()[:, None] * vt).T, upper=True).T.float()
        right = right.cpu().contiguous()  # (r, C)
        pair = [Stored(route, tuple(factor.shape), FORMATS[route.format].encode(factor, route), name)
                for route, factor in ((left_route, left), (right_route, right))]
        ready = [FORMATS[half.route.format].decode(half.coded, half.route, half.shape) for half in pair]
        fixed = corrected(row.decoded, *ready)
        cost, visits = error_costs(fixed.to(weight) - weight, weight, calibration, sites[name])
        size = sum(math.prod(half.shape) * FORMATS[half.route.format].bits / 8 for half in pair)
        if cost < row.cost:
            error = float((fixed.to(weight) - weight).norm() / weight.norm().clamp_min(1e-30))
            found.append(((cost - row.cost) / size, name, pair, row._replace(cost=cost, visits=visits, error=error,
                                                                           decoded=fixed)))
    factors = {}
    for _, name, pair, row in sorted(found, key=lambda item: item[:2])[:settings.lqer_top_k]:
        solved[name] = row
        factors |= {f"{name} left": pair[0], f"{name} right": pair[1]}
    return factors


# -- the steps: divided over tensors, fitted to the cap, forecast


STRETCH_LIMIT, FIT_PASSES, FIT_WINDOW_BYTES = 64.0, 4, 4000


def stretched(routes: Mapping[str, Route], log_factor: float) -> dict[str, Route]:
    """The routes with every free step times one common factor, within what its grid allows."""
    factor = math.exp(log_factor)
    return {name: route._replace(stretch=factor if route.steps is not None else
                                 min(STRETCH_LIMIT, max(finest_stretch(route), factor)))
            if can_stretch(route) else route for name, route in routes.items()}


def policy_steps(weight: Tensor, route: Route) -> Tensor:
    """The mean step of each row (R,), fp64, as the route says."""
    form = FORMATS[route.format]
    return decode_levels(*form.measure(as_rows(weight).double(), route, form.bits)[:3]).double().mean(1)


# Of the mean curvature, added to every row's: a rare token's row is seen too seldom in calibration to be trusted alone.
ROW_CURVATURE_SHARE = 0.3


def allocate_steps(weights: Mapping[str, Tensor], routes: Mapping[str, Route], calibration: Calibration,
                   sites: Mapping[str, list[str]], settings: ArtifactSettings) -> dict[str, Route]:
    """The routes with steps for every row such that a bit more or less costs the same everywhere: step ~ 1 / sqrt(c), c
    being the curvature of the loss along one weight of the row. The mean logarithm of the steps, and with it the bits,
    stays what the policy says, except for rows that are held at the finest step of their grid (with CLIP_QUANTILE that
    is the policy's own). Groups of a row get the row's step.

    A row's c is the sum over visits of E[g_r^2] tr(E[x x^T]) / C. Where gptq solves, the trace shrinks to the sum of
    1 / U_jj^2, the variances of what it cannot push onto later columns. Rate and distortion of fine grids: bits fall
    with log2 step, cost grows with c step^2 / 24.
    """
    chosen: dict[str, Tensor] = {}
    change, total = 0.0, 0
    for name, route in routes.items():
        moment = moments_of(calibration, sites.get(name, []))
        if moment is None or not moment.any() or not can_stretch(route):
            continue
        curvature = sum(calibration.slopes[site].double() * calibration.inputs[site].double().trace()
                        for site in sites[name]) / len(moment) / calibration.tokens ** 2
        if route.solver == "gptq":
            upper = upper_factor(moment.double(), settings.gptq_damping)
            curvature = curvature * (upper.diagonal().pow(-2).sum() / moment.double().trace()).clamp_max(1.0)
        curvature = curvature + ROW_CURVATURE_SHARE * curvature.mean() + 1e-30
        chosen[name] = curvature.rsqrt()
        change += float((policy_steps(weights[name], route).log() - chosen[name].log()).sum()) * weights[name].shape[1]
        total += weights[name].numel()
    if not chosen:
        raise ConfigError("ALLOCATE=1: no tensor has both free steps and a calibration; STAGES needs calibrate before "
                          "write, or MATRIX_FORMAT an int or uint grid")
    factor = math.exp(change / total)
    return {name: route._replace(steps=chosen[name] * factor) if name in chosen else route
            for name, route in routes.items()}


def estimate_bytes(weights: Mapping[str, Tensor], routes: Mapping[str, Route], rows: int = 4096) -> float:
    """Bytes of the free-step tensors by the zeroth-order entropy of nearest codes, from at most about `rows` rows
    each."""
    total = 0.0
    for name, route in routes.items():
        if can_stretch(route):
            wide = as_rows(weights[name])
            some = slice(None, None, max(1, len(wide) // rows))
            part, steps = wide[some], None if route.steps is None else route.steps[some]
            codes = FORMATS[route.format].encode(part, route._replace(steps=steps)).codes.cpu().numpy()
            total += entropy_bits(codes) / 8 * wide.numel() / max(1, part.numel())
    return total


class Fit(NamedTuple):
    """Where the steps ended: the log of their common factor, bytes of the model, passes, and why it stopped there."""
    log_factor: float
    size: int
    passes: int
    reason: str


def fit_steps(estimate: Callable[[float], float], build: Callable[[float], int], room: int, finest: float) -> Fit:
    """The factor on all steps whose model ends within FIT_WINDOW_BYTES below `room`, in FIT_PASSES builds at most.

    `build` solves, codes and returns the real size; `estimate` is cheap and only guides: real sizes correct it for the
    next guess. CheckError where even the coarsest steps are too large.
    """
    coarsest = math.log(STRETCH_LIMIT)
    points: dict[float, float] = {}

    def guess(at: float) -> float:
        if at not in points:
            points[at] = estimate(at)
        return points[at]

    best, sizes = None, {}
    for passes in range(1, FIT_PASSES + 1):
        # Between the coarsest factor that was too large and the finest that fitted, whatever the estimate says.
        low = start = max((at for at, size in sizes.items() if size > room), default=finest)
        high = end = min((at for at, size in sizes.items() if size <= room), default=coarsest)
        target, seen = room - FIT_WINDOW_BYTES / 2, sorted(sizes, key=lambda at: abs(sizes[at] - room))[:2]
        # What the estimate would have to say: by its ratio to one real size, by the line through the two nearest.
        wanted = target * guess(seen[0]) / sizes[seen[0]] if seen else target
        if len(seen) == 2 and sizes[seen[0]] != sizes[seen[1]]:
            wanted = guess(seen[0]) + (target - sizes[seen[0]]) * (
                (guess(seen[1]) - guess(seen[0])) / (sizes[seen[1]] - sizes[seen[0]]))
        if guess(low) <= wanted:
            at = low
        else:
            for _ in range(40):
                # Sizes fall almost linearly in the logarithm of the step: false position, kept off the ends.
                above, below = guess(low), guess(high)
                share = min(0.9, max(0.1, (above - wanted) / max(1e-9, above - below)))
                middle = low + share * (high - low)
                low, high = (middle, high) if guess(middle) > wanted else (low, middle)
                if high - low < 1e-4 or abs(guess(high) - wanted) < 100:
                    break
            at = high
        if at in sizes:
            at = (start + end) / 2
        size = sizes[at] = build(at)
        if size <= room and (best is None or size > best.size):
            best = Fit(at, size, passes, "steps fitted")
        if at == finest and size <= room:
            return Fit(at, size, passes, "the finest steps of the policy are smaller than the cap")
        if room - FIT_WINDOW_BYTES <= size <= room:
            return best
        if at == coarsest and size > room:
            raise CheckError(f"FIT=1: the coarsest steps make a model of {size} bytes, {max(0, room)} are left of "
                             f"TARGET_BYTES for it; a smaller MODEL_DIM or STACK, or {size - room} bytes more, would "
                             "fit")
    if best is None:
        raise CheckError(f"FIT=1: {FIT_PASSES} passes ended above the {room} bytes that are left for the model; the "
                         f"last had {size}")
    return best._replace(passes=FIT_PASSES, reason=f"best of {FIT_PASSES} passes")


def expected_bits(columns: int, route: Route) -> float:
    """Entropy in bits of one Gaussian weight in a format: on a grid the log2 of the deviation in steps, plus
    log2 sqrt(2 pi e). Where the grid ends at the largest value, that is the median of the largest of so many
    Gaussians."""
    form = FORMATS[route.format]
    if not can_stretch(route):
        return form.bits
    span = min(columns, route.group or columns)
    sigmas = route.sigmas or statistics.NormalDist().inv_cdf(0.5 + 0.5 * 0.5 ** (1 / max(2, span)))
    steps = (form.high - form.low) / 2 / sigmas / route.stretch / SCALE_RATIO ** 0.5
    return max(0.05, min(form.bits, 0.5 * math.log2(2 * math.pi * math.e * (steps ** 2 + 1 / 12))))


def forecast_bytes(model: nn.Module, routes: Mapping[str, Route]) -> dict[str, float]:
    """Predicted bytes of the artifact by role, before any training, and `container` for header and checksum."""
    forecast = {"container": 400.0 + 250.0 * (getattr(model, "grammar", None) is not None)}
    for name, parameter in model.named_parameters():
        route = routes[name]
        size = parameter.numel() * (FORMATS[route.format].coded_bits or FORMATS[route.format].bits) / 8
        if FORMATS[route.format].measure:
            rows, columns = as_rows(parameter).shape
            scales = rows + rows * group_count(columns, route.group) * (route.group > 0)
            size = rows * columns * expected_bits(columns, route) / 8 + 0.6 * scales
        forecast[parameter.role] = forecast.get(parameter.role, 0.0) + size
        forecast["container"] += 18
    return forecast


def forecast_extras(model: nn.Module, settings: ArtifactSettings) -> float:
    """Bytes of low-rank factors and of finer columns, taken to be the embedding's and those of the widest matrices."""
    shapes = sorted((tuple(p.shape) for p in model.parameters() if p.role in ("embedding", "matrix")), key=math.prod)
    factors = sum(settings.lqer_rank * (rows * FORMATS[LEFT_FACTOR.format].bits + columns * (
        FORMATS[RIGHT_FACTOR.format].bits + 8 / settings.lqer_asym_group)) / 8
        for rows, columns in shapes[-settings.lqer_top_k:]) if settings.lqer_rank else 0.0
    rows, columns = shapes[-1]
    finer = (settings.awq_lite_bits - settings.embed_bits) * (columns >= settings.awq_lite_group_size)
    return factors + settings.awq_lite_group_top_k * settings.awq_lite_group_size * rows * max(0, finer) / 8


def forecast_fitted(model: nn.Module, settings: ArtifactSettings, code_bytes: int) -> dict[str, float]:
    """forecast_bytes with all corrections; with FIT at the steps that the fit is expected to choose."""
    extras = forecast_extras(model, settings)
    forecast = forecast_steps(model, settings, code_bytes + extras)
    return {**forecast, "container": forecast["container"] + extras}


def forecast_steps(model: nn.Module, settings: ArtifactSettings, code_bytes: float) -> dict[str, float]:
    """forecast_bytes; with FIT at the steps that are expected to fill what `code_bytes` leave."""
    routes = routes_of(model, settings)
    if not settings.fit:
        return forecast_bytes(model, routes)
    room = settings.target_bytes - code_bytes - FIT_WINDOW_BYTES / 2
    low, high = min(math.log(finest_stretch(route)) for route in routes.values()), math.log(STRETCH_LIMIT)
    if sum(forecast_bytes(model, stretched(routes, low)).values()) <= room:
        return forecast_bytes(model, stretched(routes, low))
    while high - low > 1e-4:
        middle = (low + high) / 2
        small = sum(forecast_bytes(model, stretched(routes, middle)).values()) <= room
        low, high = (low, middle) if small else (middle, high)
    return forecast_bytes(model, stretched(routes, high))


def squeeze_steps(settings: ArtifactSettings) -> list[str]:
    """Names of the optional steps that the settings switch on, rows of REFINEMENTS and CORRECTIONS, in their order."""
    wanted = {"awq_lite": settings.awq_lite_group_top_k, "allocate": settings.allocate, "lqer": settings.lqer_rank}
    return [name for name, on in wanted.items() if on]


# What changes the routes before anything is solved, and what adds tensors after it.
REFINEMENTS: dict[str, Callable[..., dict[str, Route]]] = {"awq_lite": add_fine_columns, "allocate": allocate_steps}
CORRECTIONS: dict[str, Callable[..., dict[str, Stored]]] = {"lqer": correct_errors}


def least_log_factor(weights: Mapping[str, Tensor], routes: Mapping[str, Route]) -> float:
    """The log factor at which every free step is at its finest."""
    least = 0.0
    for name, route in routes.items():
        if can_stretch(route) and route.steps is None:
            least = min(least, math.log(finest_stretch(route)))
        elif can_stretch(route):
            finest = policy_steps(weights[name], route._replace(steps=None, stretch=finest_stretch(route)))
            least = min(least, float((finest / route.steps).log().min()))
    return least


# ==== 13 EVALUATORS =========================================================================================
# One number, honestly: nats of every validation target over the bytes of the documents. The referee owns the
# tokens, the ledger and the clock; a predictor is a guest. It is shown a question without the answers, offers
# logits over the whole vocabulary, which the referee normalises and scores, and only then is told the targets
# and may learn. What runs where is planned beforehand and is the same for any number of ranks. To add an
# evaluator: a plan, a guest, a row in EVALUATORS. bits_per_byte is the only function that divides by bytes.


def bits_per_byte(nats: float, count: int) -> float:
    """Bits per byte: nats over ln 2, over UTF-8 bytes."""
    return nats / math.log(2) / count


class Window(NamedTuple):
    """Input tokens [start, stop) predict targets [start + 1, stop]; those from `first` on are scored."""
    start: int
    stop: int
    first: int


class Round(NamedTuple):
    """One forward, a window a row. `fresh` begins new rows; the first `more` rows go on in the job's next round."""
    windows: list[Window]
    fresh: bool = True
    more: int = 0

    def positions(self) -> int:
        """Positions that the forward computes, padding included."""
        return len(self.windows) * max(window.stop - window.start for window in self.windows)


# Work that several ranks may share is cut into so many parts whatever their number, and added in their order.
PARTS = 8

# The rounds of a job share a state and follow each other. The jobs of a stage know nothing of each other, so they may
# run anywhere, in any order. A stage begins when the one before is scored; its targets lie side by side.
Job = tuple[Round, ...]
Stage = list[Job]


def slide(start: int, end: int, length: int, stride: int, opening: int) -> list[Window]:
    """Windows over inputs [start, end): the first scores `opening` targets, each later one `stride` new ones behind as
    much context as fits into `length`."""
    windows = [Window(start, min(start + opening, end), start + 1)]
    while windows[-1].stop < end:
        stop = min(windows[-1].stop + stride, end)
        windows.append(Window(max(start, stop - length), stop, windows[-1].stop + 1))
    return windows


def find_documents(tokens: np.ndarray) -> list[tuple[int, int]]:
    """(start, end) of each document: inputs [start, end) from its BOS on; its last target is the next BOS, or the last
    token. A BOS that ends the stream predicts nothing and is left out."""
    starts = np.flatnonzero(tokens == BOS).tolist()
    return [(start, end) for start, end in zip(starts, [*starts[1:], len(tokens) - 1], strict=True) if start < end]


def in_batches(windows: list[Window], settings: EvalSettings) -> Stage:
    """One job a batch of windows: as many rows as EVAL_BATCH_TOKENS hold, longest windows first."""
    windows, stage, at = sorted(windows, key=lambda window: window.start - window.stop), [], 0
    while at < len(windows):
        rows = max(1, settings.eval_batch_tokens // (windows[at].stop - windows[at].start))
        stage.append((Round(windows[at:at + rows]),))
        at += rows
    return stage


def plan_contiguous(tokens: np.ndarray, config: Config) -> list[Stage]:
    """Windows side by side over the stream; the last may be short."""
    end, length = len(tokens) - 1, config.eval.eval_seq_len
    return [in_batches([Window(start, min(start + length, end), start + 1) for start in range(0, end, length)],
                       config.eval)]


def plan_sliding(tokens: np.ndarray, config: Config) -> list[Stage]:
    """Windows of EVAL_SEQ_LEN over the stream, EVAL_STRIDE new targets each."""
    settings = config.eval
    return [in_batches(slide(0, len(tokens) - 1, settings.eval_seq_len, settings.eval_stride, settings.eval_seq_len),
                       settings)]


def plan_document(tokens: np.ndarray, config: Config) -> list[Stage]:
    """The same within each document, from its BOS on: no row holds a second one."""
    settings = config.eval
    windows = [slide(start, end, settings.eval_seq_len, settings.eval_stride, settings.eval_seq_len)
               for start, end in find_documents(tokens)]
    return [in_batches([window for row in windows for window in row], settings)]


def plan_ngram(tokens: np.ndarray, config: Config) -> list[Stage]:
    """The sliding windows, a stage for every NGRAM_CHUNK_TOKENS targets, in parts that eight ranks can share."""
    settings, stages, part = config.eval, [], []
    windows = slide(0, len(tokens) - 1, settings.eval_seq_len, settings.eval_stride, settings.eval_seq_len)
    for window in windows:
        part.append(window)
        if window.stop - part[0].first + 1 >= config.ngram.ngram_chunk_tokens or window is windows[-1]:
            size = max(1, min(-(-len(part) // PARTS), settings.eval_batch_tokens // settings.eval_seq_len))
            stages.append([(Round(part[at:at + size]),) for at in range(0, len(part), size)])
            part = []
    return stages


def _group_documents(spans: list[tuple[int, int]], settings: TTTSettings) -> Stage:
    """Documents of similar length side by side, longest first: at most TTT_BATCH_SIZE rows, none below half of the
    longest, which also says the size of their chunks. Rows that end drop out."""
    left, groups = sorted(spans, key=lambda span: span[0] - span[1]), []
    while left:
        longest = left[0][1] - left[0][0]
        count = sum(2 * (end - start) >= longest for start, end in left[:settings.ttt_batch_size])
        spans, left = left[:count], left[count:]
        chunk = next((size for upto, size in parse_chunk_steps(settings.ttt_short_score_first_steps)
                      if longest <= upto), settings.ttt_chunk_size)
        rows = [slide(start, end, settings.ttt_eval_seq_len, chunk, chunk) for start, end in spans]
        groups.append(tuple(Round([row[number] for row in rows if number < len(row)], number == 0,
                                  sum(number + 1 < len(row) for row in rows)) for number in range(len(rows[0]))))
    return groups


def plan_ttt(tokens: np.ndarray, config: Config) -> list[Stage]:
    """Groups of documents, chunk by chunk. Strict: every document begins anew, so there is one stage, and any order is
    the same. Declared modes: a warm start chains the groups of a track; each phase of the global update is a stage."""
    settings, spans = config.ttt, find_documents(tokens)
    prefix, phases = min(settings.phased_ttt_prefix_docs, len(spans)), settings.phased_ttt_num_phases
    bounds = sorted({0, len(spans), *(prefix * number // phases for number in range(1, phases + 1))})
    stages = [_group_documents(spans[low:high], settings) for low, high in itertools.pairwise(bounds)]
    if settings.ttt_warm_start_a:
        stages = [[sum((stage[index] for index in track), ()) for track in assign(stage, PARTS) if track]
                  for stage in stages]
    return stages


# The latency of one forward, counted in positions.
STEP_POSITIONS = {"cpu": 256.0, "cuda": 16384.0}


def assign(jobs: Stage, workers: int, step_positions: float = STEP_POSITIONS["cpu"]) -> list[list[int]]:
    """Job numbers for each worker, a pure function of the plan: longest first, each to the one that has least so far.
    A job costs the positions of its rounds and the latency of each."""
    loads, shares = [(0.0, worker) for worker in range(workers)], [[] for _ in range(workers)]
    costs = [sum(step_positions + item.positions() for item in job) for job in jobs]
    for number in sorted(range(len(jobs)), key=lambda number: -costs[number]):
        load, worker = heapq.heappop(loads)
        shares[worker].append(number)
        heapq.heappush(loads, (load + costs[number], worker))
    return shares


class Ledger:
    """Counts how often each target was scored, and journals scores and updates in their order, job by job. Position 0
    has no context and is no target."""

    def __init__(self, count: int) -> None:
        self.scored = np.zeros(count, np.uint8)
        self.journal: dict[tuple[int, int], str] = {}
        self.updates: dict[tuple[int, int], int] = {}

    def score(self, job: tuple[int, int], windows: Iterable[Window]) -> None:
        """Record that these windows' targets are scored now; CheckError for a target that was scored before."""
        for window in windows:
            span = self.scored[window.first:window.stop + 1]
            if window.first < 1 or span.any():
                raise CheckError(f"targets {window.first}..{window.stop}: scored twice, or no targets")
            span += 1
            self.journal[job] = self.journal.get(job, "") + f"score {window.first} {window.stop};"

    def learn(self, job: tuple[int, int], windows: Iterable[Window]) -> None:
        """Record an update that saw these windows' targets; CheckError where one of them is not scored yet."""
        for window in windows:
            if early := int((self.scored[window.first:window.stop + 1] == 0).sum()):
                raise CheckError(f"targets {window.first}..{window.stop}: an update saw {early} of them before their "
                                 "score")
            self.journal[job] = self.journal.get(job, "") + f"learn {window.first} {window.stop};"
        self.updates[job] = self.updates.get(job, 0) + 1

    def merge(self, world: World, low: int, high: int) -> None:
        """After a stage, all ranks know targets low..high as scored; CheckError unless each was exactly once."""
        counts = torch.from_numpy(self.scored[low:high + 1].astype(np.int32)).to(world.device)
        if missed := int((world.add_(counts) != 1).sum()):
            raise CheckError(f"{missed} of {len(counts)} targets were not scored exactly once")
        self.scored[low:high + 1] = 1

    def close(self, world: World) -> tuple[dict[str, Any], str]:
        """The `ledger` of result.json over all ranks, and the journal, a line a job; CheckError unless every target was
        scored exactly once."""
        if missed := int((self.scored[1:] != 1).sum()) + int(self.scored[0]):
            raise CheckError(f"{missed} of {len(self.scored) - 1} targets were not scored exactly once")
        parts = world.gather((sum(self.updates.values()), self.journal))
        journal = {job: text for _, part in parts for job, text in part.items()}
        text = "\n".join(journal[job] for job in sorted(journal))
        return {"targets": len(self.scored) - 1, "scored_once": True, "updates": sum(count for count, _ in parts),
                "journal_sha256": hashlib.sha256(text.encode()).hexdigest()}, text


class Ask(NamedTuple):
    """A question: inputs (B, T) int64 and their documents ((B, T), spans or None), padded behind each row's last token.
    `places` (S,) are the flat positions whose next token is asked for, row by row, `counts` of them in each row; the
    first `more` rows go on afterwards."""
    windows: list[Window]
    tokens: Tensor
    docs: Tensor | Spans | None
    places: Tensor
    counts: list[int]
    more: int


class Told(NamedTuple):
    """What a guest is told after a stage: its first target's position, the tokens (n,) int64 of its targets, and the
    notes (n, K) that the guest made for them."""
    low: int
    tokens: np.ndarray
    notes: np.ndarray


class Noted(NamedTuple):
    """Notes on the asked targets: `columns` (S, K), the first of which the referee overwrites with the entry of `rows`
    (S, V) at the target, once that is scored."""
    rows: Tensor
    columns: np.ndarray


class Frozen:
    """The model as it stands: the plain guest, and the interface of every other one. Lanes call it side by side, so
    what changes within a job lives in the state that `begin` makes."""
    # Whether what it offers are log-probabilities; the referee then refuses those that do not sum to one.
    normalised = False
    # How many numbers it notes for each target; the referee keeps them and tells `absorb` after the stage.
    notes = 0
    # Whether its attention wants the documents of a question as spans.
    packed = False

    def __init__(self, model: GPT, config: Config, world: World, phase: "int | Phase", compiled: bool) -> None:
        self.config, self.world, self.phase, self.compiled = config, world, phase, compiled
        self.use(model)

    def use(self, model: GPT) -> None:
        """Predict with this model."""
        self.model, self.packed = model, model.packed
        # Questions come in many lengths, for which an unrolled recurrence would be compiled one by one.
        on = self.compiled and not model.unrolled
        self.forward = make_compiled(self.bind(model, self.phase), on, dynamic=True)

    def bind(self, model: GPT, phase: "int | Phase") -> Callable[..., Tensor]:
        """The forward of a plan, with what the evaluation asks of it."""
        return make_forward(model, phase, self.config.eval.loop_exit)

    def rehearsed(self) -> "list[Frozen]":
        """Itself in each way it can come to work, the slowest last: what is rehearsed before the clock starts."""
        return [self]

    def begin(self, rows: int, before: Any) -> Any:
        """The state of new rows, given that of the rows before them in the same job, or None."""
        return None

    def predict(self, state: Any, ask: Ask, offer: Callable[[Tensor], None]) -> Noted | None:
        """Offer logits (any number of rows, V) for all places, in their order; return notes where it makes any. Must
        not look at inputs behind a place, nor keep anything."""
        with torch.inference_mode():
            hidden = self.forward(ask.tokens, ask.docs).flatten(0, 1)[ask.places]  # (S, D)
            for start in range(0, len(hidden), HEAD_ROWS):
                offer(self.model.logits(hidden[start:start + HEAD_ROWS]))

    def learn(self, state: Any, ask: Ask, targets: Tensor) -> bool:
        """Learn from the targets (S,) of the question just scored, for the rows that go on; whether it did."""
        return False

    def absorb(self, told: Told) -> bool:
        """Learn from a whole stage, the same on every rank; whether it did."""
        return False


def add_matrix(weight: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """y (B, T, out) plus x (B, T, in) through a whole matrix (B, out, in)."""
    return y + x @ weight.to(x.dtype).mT


class Adapters:
    """What a group of documents has learned: for each part of each addition a tensor (B, ...), a document a row, with
    its average for scoring and Adam's moments."""

    def __init__(self, guest: "TestTime", rows: int, before: "Adapters | None") -> None:
        self.step, self.held = 0, None
        self.values = [start.expand(rows, *start.shape).clone() for start in guest.starts]
        if before is not None:
            # A warm start: the halves that read the input go on as the row before left them.
            for part in guest.warm:
                kept = before.values[part][:rows]
                self.values[part][:len(kept)] = kept
        self.average = [part.clone() for part in self.values] if guest.settings.ttt_polyak_decay else self.values
        self.firsts, self.seconds = ([torch.zeros_like(part) for part in self.values] for _ in range(2))


class TestTime(Frozen):
    """Score-first test-time training: each document has its own additions, which learn from each of its chunks once
    that is scored. Strict: nothing of one document reaches another. Source: PR 1530 of the challenge and after."""
    __test__ = False

    def __init__(self, model: GPT, config: Config, world: World, phase: "int | Phase", compiled: bool) -> None:
        super().__init__(model, config, world, phase, compiled)
        settings = self.settings = config.ttt
        self.scale = settings.ttt_lora_alpha / max(1, settings.ttt_lora_rank)
        self.adam = OptimSettings(beta1=settings.ttt_beta1, beta2=settings.ttt_beta2, adam_eps=1e-10)
        self.lift = 2.0 ** 10 if model.dtype == torch.float16 else 1.0  # keeps small gradients above float16's zero
        rank, shapes, device = settings.ttt_lora_rank, site_shapes(model, phase), model.tok_emb.device
        self.low = [site for site in shapes if rank and site.rpartition(".")[2] in settings.ttt_sites]
        self.whole = [site for site in shapes if settings.ttt_down_lr and site.endswith(".down")]
        self.starts: list[Tensor] = []
        for site in self.low:
            inputs, outputs = shapes[site]
            generator = torch.Generator().manual_seed(stream_seed(config.run.seed, f"ttt {site}"))
            drawn = torch.empty(rank, inputs).uniform_(-inputs ** -0.5, inputs ** -0.5, generator=generator)
            self.starts += [drawn.to(device), torch.zeros(outputs, rank, device=device)]
        self.warm, self.split = range(0, 2 * len(self.low), 2), 2 * len(self.low)
        self.starts += [torch.zeros(shapes[site][::-1], device=device) for site in self.whole]
        self.stream = np.array([BOS], np.int64)

    def begin(self, rows: int, before: Adapters | None) -> Adapters:
        return Adapters(self, rows, before if self.settings.ttt_warm_start_a else None)

    def answer(self, leaves: list[Tensor], ask: Ask, rows: int) -> Tensor:
        """Logits (S, V) at the places of the first `rows` rows, with the additions whose parts are given."""
        deltas: dict[str, Any] = {site: Delta(a, b * self.scale) for site, a, b in
                                  zip(self.low, leaves[:self.split:2], leaves[1:self.split:2], strict=True)}
        deltas |= {site: functools.partial(add_matrix, weight)
                   for site, weight in zip(self.whole, leaves[self.split:], strict=True)}
        counts = ask.counts[:rows]
        asked = (torch.arange(max(counts)) < torch.tensor(counts)[:, None]).to(ask.places.device)  # (B, C)
        places = ask.places.new_zeros(asked.shape).masked_scatter_(asked, ask.places[:sum(counts)])
        hidden = self.forward(ask.tokens[:rows], ask.docs, deltas)  # (B, T, D)
        return self.model.logits(hidden.flatten(0, 1)[places], deltas)[asked]

    def predict(self, state: Adapters, ask: Ask, offer: Callable[[Tensor], None]) -> Noted | None:
        rows = len(ask.windows)
        keep = bool(ask.more and self.starts and self.settings.ttt_grad_steps and state.average is state.values)
        # Where the score is taken with what is to be trained, its graph serves the first step.
        with torch.set_grad_enabled(keep):
            leaves = [part[:rows].detach().requires_grad_(keep) for part in state.average]
            logits = self.answer(leaves, ask, rows)
        state.held = (logits, leaves) if keep else None
        offer(logits.detach())

    def learn(self, state: Adapters, ask: Ask, targets: Tensor) -> bool:
        settings, more = self.settings, ask.more
        counts = torch.tensor(ask.counts[:more], device=targets.device)
        share = (1 / counts).repeat_interleave(counts)
        for _ in range(settings.ttt_grad_steps if self.starts else 0):
            with torch.enable_grad():
                if state.held is None:
                    leaves = [part[:more].detach().requires_grad_() for part in state.values]
                    state.held = self.answer(leaves, ask, more), leaves
                (logits, leaves), state.held = state.held, None
                losses = F.cross_entropy(logits[:len(share)], targets[:len(share)], reduction="none")
                grads = torch.autograd.grad((losses * share).sum() * self.lift, leaves)
            if self.lift != 1:
                torch._foreach_mul_(grads, 1 / self.lift)
            state.step += 1
            lines = [[part[:more] for part in parts] for parts in (state.values, grads, state.firsts, state.seconds)]
            for kind, rate in ((slice(self.split), settings.ttt_lora_lr),
                               (slice(self.split, None), settings.ttt_down_lr)):
                if self.starts[kind]:
                    adamw_update_(*(line[kind] for line in lines), state.step, rate, settings.ttt_weight_decay,
                                  self.adam)
            if settings.ttt_polyak_decay:
                torch._foreach_lerp_(state.average, state.values, 1 - settings.ttt_polyak_decay)
        return bool(self.starts and settings.ttt_grad_steps)

    def absorb(self, told: Told) -> bool:
        """Between phases: SGD on the whole model over all documents scored so far. The rows of a step are cut into the
        same parts for any number of ranks, and their gradients are added in one order."""
        settings, world = self.settings, self.world
        if not settings.global_ttt_lr:
            return False
        if len(self.stream) == 1:
            self.use(copy.deepcopy(self.model))
            self.momenta = [torch.zeros_like(parameter) for parameter in self.model.parameters()]
        self.stream = np.concatenate([self.stream, told.tokens])
        self.model.requires_grad_(True)
        loss, parameters = make_loss(self.model, self.phase), list(self.model.parameters())
        length = min(settings.ttt_eval_seq_len, len(self.stream) - 1)
        starts = range(0, len(self.stream) - length, length)
        rows = max(1, settings.global_ttt_chunk_tokens // length)
        steps = [starts[at:at + rows] for at in range(0, len(starts), rows)] * settings.global_ttt_epochs
        for number, step in enumerate(steps):
            grads = torch.zeros(PARTS, sum(map(torch.numel, parameters)), device=world.device)
            for part in range(world.rank, min(PARTS, len(step)), world.size):
                mine = [self.stream[start:start + length + 1] for start in step[part::PARTS]]
                batch = torch.from_numpy(np.stack(mine)).to(world.device)
                docs = document_index(batch[:, :-1]) if self.config.data.doc_isolation else None
                with torch.enable_grad():
                    found = torch.autograd.grad(loss(batch[:, :-1], batch[:, 1:], docs) * (
                        self.lift * len(mine) / len(step)), parameters, materialize_grads=True)
                grads[part] = torch.cat([grad.flatten() for grad in found])
            total = world.add_(grads).sum(0) / self.lift
            clip = settings.global_ttt_grad_clip
            total *= min(1.0, clip / max(float(total.norm()), 1e-12)) if clip else 1.0
            rate = settings.global_ttt_lr * 0.5 * (1 + math.cos(math.pi * number / len(steps)))
            parts = [part.view_as(parameter) for part, parameter in
                     zip(total.split([parameter.numel() for parameter in parameters]), parameters, strict=True)]
            torch._foreach_mul_(self.momenta, settings.global_ttt_momentum)
            torch._foreach_add_(self.momenta, parts)
            torch._foreach_add_([parameter.data for parameter in parameters], self.momenta, alpha=-rate)
        self.model.requires_grad_(False)
        return True


def shrink_nothing(config: Config) -> dict[str, Any]:
    """No cheaper settings."""
    return {}


def shrink_stride(config: Config) -> dict[str, Any]:
    """Twice the stride, as far as the window goes, and the n-grams that want room in it."""
    room = max(config.ngram.ngram_eval_order, *map(int, config.ngram.token_order)) * ("ngram" in config.eval.eval)
    stride = min(2 * config.eval.eval_stride, config.eval.eval_seq_len - room)
    return {"EVAL_STRIDE": stride} if stride > config.eval.eval_stride else {}


def shrink_chunk(config: Config) -> dict[str, Any]:
    """One chunk size for all documents, then twice that, as far as the context goes."""
    if config.ttt.ttt_short_score_first_steps:
        return {"TTT_SHORT_SCORE_FIRST_STEPS": ""}
    chunk = min(2 * config.ttt.ttt_chunk_size, config.ttt.ttt_eval_seq_len)
    return {"TTT_CHUNK_SIZE": chunk} if chunk > config.ttt.ttt_chunk_size else {}


def mix_grams(model: Tensor, weights: np.ndarray, matches: list[Matches], base: np.ndarray, discount: float) -> Tensor:
    """ln(w_0 P_model + sum of w_n P_n), (S, V) float32, from P_model (S, V) float32, which it overwrites, weights
    (S, 1 + E) and P_1 (V,). What an order gives to the next lower one is carried down, so that the dense work is done
    once."""
    count, vocab = model.shape
    carry, scales = np.zeros(count), []
    for column, match in reversed(list(enumerate(matches, 1))):
        carry = carry + weights[:, column]
        total = match.total[match.which]
        scales.append(np.where(total, carry / np.maximum(total, 1), 0.0))
        carry = np.where(total, scales[-1] * discount * match.kinds[match.which], carry)

    def put(values: np.ndarray, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.from_numpy(values).to(model.device, dtype)

    # A float32 log_softmax sums to one within 1.3e-6 only.
    model.mul_(put(weights[:, :1]) / model.sum(-1, keepdim=True)).addr_(put(carry), put(base))
    flat = model.view(-1)
    for scale, match in zip(reversed(scales), matches, strict=True):
        size = match.kinds[match.which]
        at = spans(match.start[match.which], size)
        where = np.repeat(np.arange(count) * vocab, size) + (match.pairs[at] & 0xFFFF)
        flat[put(where, torch.int64)] += put((match.count[at] - discount) * np.repeat(scale, size))
    return model.log_()


def hints_of(matches: list[Matches], settings: NgramSettings) -> list[Matches]:
    """The same contexts with their most frequent token as the only one, counted once, where it passes its order's
    thresholds, else with none. `best` is then its share."""
    kept = []
    limits = zip(matches, settings.token_threshold, settings.token_min_count, strict=True)
    for match, threshold, least in limits:
        share = match.best / np.maximum(match.total, 1)
        rows = np.flatnonzero((share >= threshold) & (match.total >= max(1, least)))
        small = make_matches(match.which, len(match.total), rows << 16 | match.hint[rows], np.ones(len(rows), np.int64))
        kept.append(small._replace(best=small.best * share))
    return kept


class Facts(NamedTuple):
    """What a gate may know of S positions; all of it is fixed before their targets are. The model's entropy in nats
    (S,); for each order (S, E) the sum of the counts behind the position's context, how many tokens they belong to, the
    largest count, and, for hints, the model's log-probability of the token that has it; logits (S, 1 + E) of a head."""
    entropy: np.ndarray
    total: np.ndarray
    kinds: np.ndarray
    best: np.ndarray
    hint: np.ndarray | None = None
    head: np.ndarray | None = None

    def highest(self, least: int = 1) -> np.ndarray:
        """The column 1 .. E of the highest order whose context was seen `least` times, 0 for none: (S,)."""
        return ((self.total >= least) * np.arange(1, self.total.shape[1] + 1)).max(1)

    def pick(self, values: np.ndarray, column: np.ndarray) -> np.ndarray:
        """values (S, E) at the column 1 .. E of each position; at column 0 those of the first order."""
        return values[np.arange(len(column)), np.maximum(column - 1, 0)]


class Gate(NamedTuple):
    """How much the model and each order get: weights(state, facts, settings) is (S, 1 + E) with rows that sum to one.
    update(state, facts, chances, settings) is the state after a block, from what the model and each order gave to the
    tokens that came, (S, 1 + E). A gate with `hints` mixes the hints of TOKEN_ORDER in the place of distributions; one
    with `head` wants the logits of the model's mixer head."""
    start: Callable[[NgramSettings], Any]
    weights: Callable[[Any, Facts, NgramSettings], np.ndarray]
    update: Callable[[Any, Facts, np.ndarray, NgramSettings], Any]
    hints: bool = False
    head: bool = False


def orders_of(settings: NgramSettings) -> tuple[int, ...]:
    """The orders that the gate mixes, rising."""
    return tuple(map(int, settings.token_order) if GATES[settings.ngram_gate].hints else
                 range(2, settings.ngram_eval_order + 1))


def by_order(values: tuple[float, ...], settings: NgramSettings) -> np.ndarray:
    """values of the orders 2, 3 .., the last one for all later ones, as (1 + E,) beside a 1 for the model."""
    return np.array([1.0] + [values[min(order - 2, len(values) - 1)] for order in orders_of(settings)])


def give(column: np.ndarray, share: np.ndarray, facts: Facts) -> np.ndarray:
    """Weights (S, 1 + E): `share` (S,) for the order in that column, the rest, or in column 0 all, for the model."""
    weights = np.zeros((len(column), facts.total.shape[1] + 1))
    weights[:, 0] = 1 - share
    weights[np.arange(len(column)), column] += share
    return weights


def entropy_weights(multipliers: np.ndarray, facts: Facts, settings: NgramSettings) -> np.ndarray:
    """The challenge's alpha: a sigmoid of the entropy, around a centre that falls with the order, times the matched
    order's multiplier, (1 + E,) or (1 + E, 3, 3) in cells of entropy and count, at most 0.95."""
    column = facts.highest(settings.ngram_eval_min_count)
    center = settings.ngram_eval_entropy_center - settings.ngram_entropy_shift * (column - 1)
    sigmoid = 1 / (1 + np.exp(-settings.ngram_eval_entropy_scale * (facts.entropy - center)))
    low, high = settings.ngram_eval_alpha_min, settings.ngram_eval_alpha_max
    cells = (column, *cubric_cells(facts, column, settings))[:multipliers.ndim]
    return give(column, np.minimum((low + (high - low) * sigmoid) * multipliers[cells], 0.95) * (column > 0), facts)


def keep_state(state: Any, facts: Facts, chances: np.ndarray, settings: NgramSettings) -> Any:
    """For gates that learn nothing."""
    return state


def cubric_cells(facts: Facts, column: np.ndarray, settings: NgramSettings) -> tuple[np.ndarray, np.ndarray]:
    """Bins 0 .. 2 of each position's entropy and of the count behind its context, (S,) each."""
    center = settings.ngram_eval_entropy_center
    return (np.digitize(facts.entropy, [center - 1, center + 1]), np.digitize(facts.pick(facts.total, column), [5, 50]))


CUBRIC_START = (0.45, 0.30, 0.45, 1.88, 2.0)  # multipliers of the orders 2, 3 .., which settled in earlier runs


def cubric_update(state: np.ndarray, facts: Facts, chances: np.ndarray, settings: NgramSettings) -> np.ndarray:
    """Cells in which the order beats the model more often than the mean of the cells rise by 3 %, the others fall."""
    column = facts.highest(settings.ngram_eval_min_count)
    rows = np.flatnonzero(column)
    cells = np.ravel_multi_index((column, *cubric_cells(facts, column, settings)), state.shape)[rows]
    hits = np.bincount(cells, minlength=state.size)
    beats = np.bincount(cells, chances[rows, column[rows]] > chances[rows, 0], state.size)
    active = hits >= 8
    if active.sum() < 4:
        return state
    rates = beats / np.maximum(hits, 1)
    lead = np.where(active, rates - rates[active].mean(), 0).reshape(state.shape)
    raised, lowered = np.minimum(state * 1.03, 2), np.maximum(state * 0.97, 0.3)
    return np.where(lead > 0.05, raised, np.where(lead < -0.05, lowered, state))


LEARNED_EDGES = ((2, 4, 9, 33), (1, 2, 3, 4, 5))  # bins of the count behind the highest context, of the entropy in nats
LEARNED_PRIOR = (100.0, 1.0)  # imagined positions that the model explained, and that the orders did, together
LEARNED_STRENGTH = 20.0  # imagined positions in a bucket, explained as in the coarser bucket around it


def learned_buckets(facts: Facts) -> list[np.ndarray]:
    """Buckets (S,) of the positions, from coarse to fine: highest order seen; with how its counts are spread (one token
    only, one with half of them, otherwise) and how many they are; with the model's entropy."""
    column = facts.highest()
    total, kinds, best = (facts.pick(values, column) for values in (facts.total, facts.kinds, facts.best))
    spread = np.where(kinds == 1, 0, np.where(2 * best >= total, 1, 2))
    middle = (column * 3 + spread) * 5 + np.digitize(total, LEARNED_EDGES[0])
    return [column, middle, middle * 6 + np.digitize(facts.entropy, LEARNED_EDGES[1])]


def learned_start(settings: NgramSettings) -> list[np.ndarray]:
    """Per level of buckets, how many positions each expert explained: (buckets, 1 + E)."""
    experts = len(orders_of(settings)) + 1
    return [np.zeros((experts * size, experts)) for size in (1, 15, 90)]


def learned_weights(state: list[np.ndarray], facts: Facts, settings: NgramSettings) -> np.ndarray:
    """Each expert's share in its bucket's past; what a bucket expects at first are the shares in the coarser one."""
    experts, strength = state[0].shape[1], sum(LEARNED_PRIOR)
    weights = np.full(experts, LEARNED_PRIOR[1] / (experts - 1) / strength)
    weights[0] = LEARNED_PRIOR[0] / strength
    for counts, bucket in zip(state, learned_buckets(facts), strict=True):
        weights = counts[bucket] + strength * weights
        weights /= weights.sum(1, keepdims=True)
        strength = LEARNED_STRENGTH
    return weights


def learned_update(state: list[np.ndarray], facts: Facts, chances: np.ndarray, settings: NgramSettings
                   ) -> list[np.ndarray]:
    """One step of online expectation maximisation: who explained the tokens that came, under the weights of before."""
    shares = learned_weights(state, facts, settings) * chances
    shares /= shares.sum(1, keepdims=True)
    return [counts + np.stack([np.bincount(bucket, share, len(counts)) for share in shares.T], 1)
            for counts, bucket in zip(state, learned_buckets(facts), strict=True)]


def head_weights(state: None, facts: Facts, settings: NgramSettings) -> np.ndarray:
    """The shares that the model's own mixer head gives."""
    return mixer_weights(torch.from_numpy(facts.head), torch.from_numpy(facts.total > 0)).numpy()


def tilt_weights(state: None, facts: Facts, settings: NgramSettings) -> np.ndarray:
    """The token tilt p(y) exp(beta [y = h]) / Z, Z = 1 + p(h) (exp(beta) - 1), gives every other token p(y) / Z: it is
    the mixture that moves 1 - 1 / Z to the hint h of the longest context that has one (#2135, #1514)."""
    column = facts.highest()
    share = facts.pick(facts.best, column) if settings.token_boost_by_share else 1.0
    excess = np.exp(facts.pick(facts.hint, column)) * np.expm1(settings.token_boost * share)
    return give(column, np.where(column, excess / (1 + excess), 0), facts)


GATES: dict[str, Gate] = {
    "entropy": Gate(lambda settings: np.ones(len(orders_of(settings)) + 1), entropy_weights, keep_state),
    "multipliers": Gate(lambda settings: by_order(settings.ngram_order_mults, settings), entropy_weights, keep_state),
    "cubric": Gate(lambda settings: np.tile(by_order(CUBRIC_START, settings)[:, None, None], (1, 3, 3)),
                   entropy_weights, cubric_update),
    "learned": Gate(learned_start, learned_weights, learned_update),
    "head": Gate(lambda settings: None, head_weights, keep_state, head=True),
    "tilt": Gate(lambda settings: None, tilt_weights, keep_state, hints=True),
}


class NgramMixture:
    """The model's distributions mixed with n-grams of what was scored. Its state follows from the told blocks alone."""

    def __init__(self, settings: NgramSettings, vocab_size: int, tokens: np.ndarray) -> None:
        """`tokens` (n,), the stream's first ones, are no targets."""
        self.settings, self.gate = settings, GATES[settings.ngram_gate]
        self.store, self.state = NgramStore(orders_of(settings), vocab_size), self.gate.start(settings)
        self.discount = 0.0 if self.gate.hints else settings.ngram_discount
        self.columns = 2 + len(self.store.orders) * self.gate.hints + (MIXER_OUTPUTS if self.gate.head else 0)
        self.store.absorb(tokens)

    def _look(self, tokens: np.ndarray, count: int) -> tuple[list[Matches], list[np.ndarray]]:
        """Matches of the last `count` tokens as contexts, and Facts' total, kinds and best of them."""
        matches = self.store.look(tokens, count)
        matches = hints_of(matches, self.settings) if self.gate.hints else matches
        return matches, [np.stack([getattr(match, name)[match.which] for match in matches], 1)
                         for name in ("total", "kinds", "best")]

    def _base(self) -> np.ndarray:
        """P_1 (V,): counts of single tokens, each one more."""
        return (self.store.unigrams + 1) / (self.store.unigrams + 1).sum()

    def predict(self, inputs: np.ndarray, log_model: Tensor, head: np.ndarray | None = None
                ) -> tuple[Tensor, np.ndarray]:
        """Log-distributions (S, V) float32 of the targets behind the last S of the input tokens (n,), given the model's
        log_model (S, V), and the notes (S, K) float32 that absorb_block wants: the caller fills column 0 with the
        model's log-probability of the target. Inputs before the last S count as contexts only; as many as there are, up
        to the highest order less 2, must be given. Changes nothing."""
        matches, counts = self._look(inputs, len(log_model))
        model = log_model.float().exp()
        columns = [torch.zeros(len(model), 1, device=model.device), -(model * log_model).sum(-1, keepdim=True)]
        if self.gate.hints:
            hints = np.stack([np.where(match.total, match.hint, 0)[match.which] for match in matches], 1)
            columns.append(log_model.float().gather(1, torch.from_numpy(hints).to(model.device)))
        notes = torch.cat(columns, 1).cpu().numpy()
        notes = notes if head is None else np.concatenate([notes, head.astype(np.float32)], 1)
        weights = self.gate.weights(self.state, self._facts(counts, notes), self.settings)
        return mix_grams(model, weights, matches, self._base(), self.discount), notes

    def _facts(self, counts: list[np.ndarray], notes: np.ndarray) -> Facts:
        """Facts of the positions of these notes."""
        experts, rest = counts[0].shape[1], notes[:, 2:].astype(np.float64)
        hint, head = (rest[:, :experts], rest[:, experts:]) if self.gate.hints else (None, rest)
        return Facts(notes[:, 1].astype(np.float64), *counts, hint, head if head.shape[1] else None)

    def absorb_block(self, tokens: np.ndarray, notes: np.ndarray) -> None:
        """Learn from a block of scored targets (S,) and their notes (S, K): first the gate, then the counts."""
        matches, counts = self._look(np.concatenate([self.store.tail, tokens[:-1]]), len(tokens))
        chances = chain_chances(matches, tokens, self._base()[tokens], self.discount)
        chances = np.concatenate([np.exp(notes[:, :1].astype(np.float64)), chances], 1)
        self.state = self.gate.update(self.state, self._facts(counts, notes), chances, self.settings)
        self.store.absorb(tokens)


class Mixed(Frozen):
    """The model mixed with n-grams of the targets scored in earlier stages: the declared cross-document memory."""
    normalised = True

    def __init__(self, model: GPT, config: Config, world: World, phase: "int | Phase", compiled: bool) -> None:
        super().__init__(model, config, world, phase, compiled)
        self.mixture = NgramMixture(config.ngram, config.data.vocab_size, np.array([BOS]))
        self.notes, self.head = self.mixture.columns, self.mixture.gate.head

    def predict(self, state: Any, ask: Ask, offer: Callable[[Tensor], None]) -> Noted:
        """The log-probabilities of the mixture; the model's own at the target is what the n-grams want to know."""
        with torch.inference_mode():
            hidden = self.forward(ask.tokens, ask.docs).flatten(0, 1)[ask.places]  # (S, D)
            models, columns, done = [], [], 0
            for row, (window, count) in enumerate(zip(ask.windows, ask.counts, strict=True)):
                models.append(self.model.logits(hidden[done:done + count]).log_softmax(-1))
                inputs = ask.tokens[row, :window.stop - window.start].cpu().numpy()
                head = self.model.mixer_logits(hidden[done:done + count]).cpu().numpy() if self.head else None
                values, notes = self.mixture.predict(inputs, models[-1], head)
                offer(values)
                columns.append(notes)
                done += count
            return Noted(torch.cat(models), np.concatenate(columns))

    def absorb(self, told: Told) -> bool:
        self.mixture.absorb_block(told.tokens, told.notes)
        return True


class Evaluator(NamedTuple):
    """An evaluator: what it scores in which order, who predicts, its name in the challenge's closing lines, what to
    change when time is short, and whether each of its rows lies within one document."""
    plan: Callable[[np.ndarray, Config], list[Stage]]
    guest: Callable[..., Frozen]
    label: str
    shrink: Callable[[Config], dict[str, Any]]
    within: bool = False


class Depths:
    """Of rows of EVAL=valve: which of VALVE_PASSES each takes next, and the mean entropy in bits of what it was just
    asked."""

    def __init__(self, levels: list[int]) -> None:
        self.levels, self.bits = levels, [0.0] * len(levels)


class Valve(Frozen):
    """Each chunk of a document in as many passes as the mean entropy of what was predicted for the one before says,
    once that is scored; the first in the middle number. Source: Chimera's entropy valve, whose rest is undefined."""

    def use(self, model: GPT) -> None:
        """Predict with this model."""
        self.model, self.packed, self.firsts = model, False, [1]
        self.depths = [make_compiled(self.bind(model, plan_phase(model.settings, 1.0, passes=int(passes))),
                                     self.compiled and not model.unrolled, dynamic=True)
                       for passes in self.config.eval.valve_passes]

    def rehearsed(self) -> "list[Frozen]":
        """In each depth alone, then in all of them side by side, the deepest first: a round has the work of all that
        its rows take."""
        found, order = [], sorted(range(len(self.depths)), key=self.config.eval.valve_passes.__getitem__)
        for firsts in (*([level] for level in order), order[::-1]):
            found.append(copy.copy(self))
            found[-1].firsts = firsts
        return found

    def begin(self, rows: int, before: Depths | None) -> Depths:
        return Depths([self.firsts[row % len(self.firsts)] for row in range(rows)])

    def predict(self, state: Depths, ask: Ask, offer: Callable[[Tensor], None]) -> Noted | None:
        with torch.inference_mode():
            levels = state.levels[:len(ask.windows)]
            # All rows at each level that occurs: what other rows hold must not change the shape of a row's products.
            found = {level: self.depths[level](ask.tokens, ask.docs) for level in sorted(set(levels))}
            hidden = torch.stack([found[level][row] for row, level in enumerate(levels)])
            logits = self.model.logits(hidden.flatten(0, 1)[ask.places])
            for row, part in enumerate(logits.split(ask.counts)):
                chances = part.float().log_softmax(-1)
                state.bits[row] = float(-(chances.exp() * chances).sum(-1).mean()) / math.log(2)
            offer(logits)
        return None

    def learn(self, state: Depths, ask: Ask, targets: Tensor) -> bool:
        theta = self.config.eval.valve_bits
        state.levels = [(bits >= theta / 2) + (bits >= theta) for bits in state.bits[:ask.more]]
        return True


EVALUATORS: dict[str, Evaluator] = {
    "contiguous": Evaluator(plan_contiguous, Frozen, "roundtrip", shrink_nothing),
    "sliding": Evaluator(plan_sliding, Frozen, "sliding_window", shrink_stride),
    "document": Evaluator(plan_document, Frozen, "document_window", shrink_stride, True),
    "ttt": Evaluator(plan_ttt, TestTime, "legal_ttt", shrink_chunk, True),
    "ngram": Evaluator(plan_ngram, Mixed, "ngram", shrink_stride),
    "valve": Evaluator(plan_ttt, Valve, "entropy_valve", shrink_chunk, True),
}


class Score(NamedTuple):
    """A finished score: nats of every target (n,) float64, zero at position 0; bytes, seconds, documents, what the
    ledger says, and its journal; `earlier` of the seconds belong to a process that was killed."""
    by_target: np.ndarray
    bytes: int
    seconds: float
    documents: int
    ledger: dict[str, Any]
    journal: str
    earlier: float

    @property
    def nats(self) -> float:
        """The sum over all targets."""
        return float(self.by_target.sum())

    @property
    def tokens(self) -> int:
        """The number of targets."""
        return len(self.by_target) - 1

    def entry(self) -> dict[str, Any]:
        """The score as it stands in result.json."""
        return {"val_loss": self.nats / self.tokens, "val_bpb": bits_per_byte(self.nats, self.bytes),
                "tokens": self.tokens, "bytes": self.bytes, "seconds": self.seconds, "documents": self.documents}


class Journal:
    """Finished jobs on disk, one file a rank, so that a killed evaluation goes on. A file is a line of JSON and raw
    numbers for each job; what a kill has cut off at its end is dropped."""

    def __init__(self, folder: Path, kind: str, key: str, world: World) -> None:
        self.key, self.found, self.lock = key, {}, threading.Lock()
        folder.mkdir(parents=True, exist_ok=True)
        for path in sorted(folder.glob(f"{kind}.*.journal")):
            self._read(path)
        # Every rank has read before any writes, and what rank 0 has read counts.
        self.found = {job: self.found[job] for job in world.same(list(self.found))}
        world.barrier()
        self.file = open(folder / f"{kind}.{world.rank}.journal", "ab")
        if self.file.tell():
            self.file.write(b"\n")

    def _read(self, path: Path) -> None:
        """The records of one file that are whole and belong to this evaluation."""
        data, at = path.read_bytes(), 0
        while (end := data.find(b"\n", at)) >= 0:
            line, at = data[at:end], end + 1
            with contextlib.suppress(ValueError, KeyError, TypeError):
                head = json.loads(line)
                body, crc = data[at:at + head["bytes"]], head.pop("crc")
                if head["key"] == self.key and zlib.crc32(json.dumps(head).encode() + body) == crc:
                    self.found[tuple(head["job"])] = {**head, "body": body}
                    at += head["bytes"]

    def write(self, job: tuple[int, int], nats: np.ndarray, notes: np.ndarray, ledger: Ledger, seconds: float) -> None:
        """Add one finished job."""
        body = nats.tobytes() + notes.tobytes()
        head = {"key": self.key, "job": job, "bytes": len(body), "targets": len(nats), "text": ledger.journal[job],
                "updates": ledger.updates.get(job, 0), "seconds": seconds}
        head["crc"] = zlib.crc32(json.dumps(head).encode() + body)
        with self.lock:
            self.file.write(json.dumps(head).encode() + b"\n" + body + b"\n")
            self.file.flush()

    def recall(self, job: tuple[int, int], windows: list[Window], ledger: Ledger) -> tuple[np.ndarray, np.ndarray]:
        """Nats and notes of a job that was finished before; it enters the ledger as it did then."""
        record = self.found[job]
        count, body = record["targets"], record["body"]
        ledger.score(job, windows)
        ledger.journal[job], ledger.updates[job] = record["text"], record["updates"]
        return np.frombuffer(body, count=count), np.frombuffer(body, np.float32, offset=8 * count).reshape(
            count, (len(body) - 8 * count) // (4 * count))


def targets_of(windows: Iterable[Window]) -> np.ndarray:
    """Positions of the windows' targets, in their order (S,) int64."""
    return np.concatenate([np.arange(window.first, window.stop + 1) for window in windows])


class Referee:
    """Asks a guest one job after the other, scores what it offers, and only then lets it learn."""

    def __init__(self, val: Validation, config: Config, world: World, clock: Callable[[], float], within: bool,
                 watch: Callable[[np.ndarray, Tensor], None] | None = None) -> None:
        self.tokens, self.world, self.clock, self.watch = val.tokens, world, clock, watch
        self.docs = None if within or not config.data.doc_isolation else np.cumsum(val.tokens == BOS)
        self.packed = False  # whether the guest's attention wants documents as spans
        self.vocab_size, self.budget = config.data.vocab_size, config.eval.eval_budget_seconds
        self.ledger, self.nats = Ledger(len(val.tokens)), np.zeros(len(val.tokens))
        self.told: dict[tuple[int, int], np.ndarray] = {}
        self.deadline = math.inf

    def ask(self, item: Round) -> tuple[Ask, np.ndarray]:
        """The question of a round, and the positions of its targets. Target tokens are shown as inputs only where they
        are the past of a later target."""
        starts, stops, firsts = (np.array(column)[:, None] for column in zip(*item.windows, strict=True))
        index = starts + np.arange(int((stops - starts).max()))  # (B, T)
        live, device = index < stops, self.world.device
        index = np.where(live, index, 0)
        tokens = torch.from_numpy(np.where(live, self.tokens[index], 0)).to(device)
        docs = None if self.docs is None else np.where(live, self.docs[index], -1)
        if docs is not None:
            docs = row_spans(docs, device) if self.packed else torch.from_numpy(docs).to(device)
        asked = live & (index >= firsts - 1)
        places = torch.from_numpy(np.flatnonzero(asked)).to(device)
        return Ask(item.windows, tokens, docs, places, asked.sum(1).tolist(), item.more), index[asked] + 1

    def settle(self, guest: Frozen, targets: Tensor, at: np.ndarray, heard: list[Tensor], values: Tensor) -> None:
        """Score the next rows of a guest's offer, (rows, V), with the normaliser that the referee computes itself."""
        done = sum(map(len, heard))
        wanted = targets[done:done + len(values)]
        if values.shape != (len(wanted), self.vocab_size):
            raise CheckError(f"a predictor offered {tuple(values.shape)} for {len(wanted)} targets of VOCAB_SIZE="
                             f"{self.vocab_size}")
        values = values.to(torch.promote_types(values.dtype, torch.float32))
        if guest.normalised and (off := float(values.logsumexp(-1).abs().max())) > 1e-4:
            raise CheckError(f"targets {at[done]}..{at[done + len(values) - 1]}: what a predictor calls probabilities "
                             f"sums to e^{off:.4g} or its inverse, must be 1")
        heard.append(F.cross_entropy(values, wanted, reduction="none").double())
        if self.watch is not None:
            self.watch(at[done:done + len(values)], values)

    def play(self, guest: Frozen, number: tuple[int, int], job: Job) -> tuple[np.ndarray, np.ndarray]:
        """One job, on this rank: nats (S,) and notes (S, K) of its targets, in the order of its rounds."""
        state, heard, notes = None, [], [np.zeros((0, guest.notes), np.float32)]
        for item in job:
            if self.clock() > self.deadline:
                raise CheckError(f"EVAL_BUDGET_SECONDS={self.budget:g}: spent, and targets are left; the same RUN_ID "
                                 "goes on with a larger one, EVAL_SHRINK=1 takes settings that fit")
            ask, at = self.ask(item)
            targets = torch.from_numpy(self.tokens[at]).to(self.world.device)
            state = guest.begin(len(item.windows), state) if item.fresh else state
            offers: list[Tensor] = []
            made = guest.predict(state, ask, functools.partial(self.settle, guest, targets, at, offers))
            if sum(map(len, offers)) != len(targets):
                raise CheckError(f"targets {at[0]}..{at[-1]}: a predictor left some out")
            self.ledger.score(number, item.windows)
            heard += offers
            if made is not None:
                made.columns[:, 0] = made.rows.gather(1, targets[:, None])[:, 0].cpu().numpy()
                notes.append(made.columns)
            if item.more and guest.learn(state, ask, targets):
                self.ledger.learn(number, item.windows[:item.more])
        nats = torch.cat(heard).cpu().numpy()
        if not np.isfinite(nats).all():
            raise CheckError(f"{np.isnan(nats).sum()} targets scored NaN and {np.isinf(nats).sum()} infinity nats")
        return nats, np.concatenate(notes)

    def enter(self, number: tuple[int, int], job: Job, nats: np.ndarray, notes: np.ndarray) -> None:
        """Put the result of a job where it belongs."""
        at = targets_of(window for item in job for window in item.windows)
        self.nats[at] = nats
        if notes.size:
            self.told[number] = notes

    def close_stage(self, guest: Frozen, number: int, stage: Stage, last: bool) -> None:
        """All ranks learn the scores of a stage; then the guest is told its targets, unless nothing follows."""
        windows = [[window for item in job for window in item.windows] for job in stage]
        low = min(window.first for row in windows for window in row)
        high = max(window.stop for row in windows for window in row)
        self.ledger.merge(self.world, low, high)
        nats = torch.from_numpy(self.nats[low:high + 1]).to(self.world.device)
        self.nats[low:high + 1] = self.world.add_(nats).cpu().numpy()
        if last:
            return
        notes = np.zeros((high + 1 - low, guest.notes), np.float32)
        for job, row in enumerate(windows):
            if (number, job) in self.told:
                notes[targets_of(row) - low] = self.told.pop((number, job))
        if guest.notes:
            notes = self.world.add_(torch.from_numpy(notes).to(self.world.device)).cpu().numpy()
        if guest.absorb(Told(low, self.tokens[low:high + 1], notes)) and self.world.first:
            self.ledger.learn((number, len(stage)), [Window(low - 1, high, low)])


def make_guest(kind: str, model: GPT, config: Config, world: World, phase: int = -1, compiled: bool = False) -> Frozen:
    """The predictor of an evaluator, for one phase of the plan."""
    phase %= len(model.phases)
    own = plan_phase(config.model, model.phases[phase].start, passes=config.eval.eval_passes) if (
        config.eval.eval_passes) else phase
    return EVALUATORS[kind].guest(model, config, world, own, compiled)


def score(kind: str, guest: Frozen, val: Validation, config: Config, world: World, clock: Callable[[], float],
          journal: Path | None = None, watch: Callable[[np.ndarray, Tensor], None] | None = None,
          deadline: float = math.inf, step_positions: float | None = None) -> Score:
    """Score the whole validation split with the evaluator `kind`. The result does not depend on the number of ranks:
    jobs are whole, each is one rank's, and every target's nats stand at its own place before they are added.

    `journal` is the folder of the journals: jobs found there are not played again. `watch` sees positions and offered
    rows (the audit). After `deadline` on the clock the score is given up, exit 3. `step_positions` is the latency of a
    round for the schedule, where it was measured.
    """
    began, row = clock(), EVALUATORS[kind]
    stages = row.plan(val.tokens, config)
    referee = Referee(val, config, world, clock, row.within, watch)
    referee.packed = guest.packed
    referee.deadline, found, kept = deadline, {}, None
    if journal is not None:
        judged = [value for name, value in config.recipe().items() if name != "EVAL" and SETTINGS[name][0] in (
            "data", "model", "eval", "ttt", "ngram", "system")]
        what = repr((kind, guest.phase, config.run.seed, guest.model.dtype, judged))
        weights = weights_digest({name: part.detach().cpu() for name, part in guest.model.named_parameters()})
        key = hashlib.sha256(val.tokens.tobytes() + (what + weights).encode()).hexdigest()
        kept = Journal(journal, kind, key, world)
        found = kept.found
    before = max((record["seconds"] for record in found.values()), default=0.0)
    referee.deadline -= before
    latency = STEP_POSITIONS[world.device.type] if step_positions is None else step_positions

    def work(number: tuple[int, int]) -> None:
        job = stages[number[0]][number[1]]
        nats, notes = referee.play(guest, number, job)
        referee.enter(number, job, nats, notes)
        if kept is not None:
            kept.write(number, nats, notes, referee.ledger, before + clock() - began)

    for number, stage in enumerate(stages):
        todo = [job for job in range(len(stage)) if (number, job) not in found]
        for job in range(len(stage)) if world.first else ():
            if (number, job) in found:
                windows = [window for item in stage[job] for window in item.windows]
                referee.enter((number, job), stage[job], *kept.recall((number, job), windows, referee.ledger))
        mine = assign([stage[job] for job in todo], world.size, latency)[world.rank]
        world.each(work, [(number, todo[index]) for index in mine])
        referee.close_stage(guest, number, stage, number + 1 == len(stages))
    if kept is not None:
        kept.file.close()
    return Score(referee.nats, int(val.bytes.sum()), before + clock() - began, val.documents,
                 *referee.ledger.close(world), before)


class Pace(NamedTuple):
    """Seconds of a round with all that belongs to it: a part for itself and a part for each of its positions."""
    round: float
    position: float

    def step_positions(self) -> float:
        """The latency of a round, counted in positions."""
        return self.round / max(self.position, 1e-12)

    def seconds(self, stages: list[Stage], workers: int) -> float:
        """Of a whole plan on so many workers (ranks times lanes), each stage as long as its longest share."""
        total = 0.0
        for stage in stages:
            costs = [sum(self.round + self.position * item.positions() for item in job) for job in stage]
            shares = assign(stage, workers, self.step_positions())
            total += max(sum(costs[job] for job in share) for share in shares)
        return total


def rehearse(kind: str, guest: Frozen, stages: list[Stage], config: Config, world: World,
             clock: Callable[[], float]) -> Pace:
    """The pace of an evaluator, from its largest round and from one row of it, on random tokens: never on validation
    tokens. It is the warm-up too, compilation included. Every rank gets rank 0's figures."""
    widest = max((item for stage in stages for job in stage for item in job), key=Round.positions)
    learns = any(item.more for stage in stages for job in stage for item in job)
    rng = np.random.default_rng(stream_seed(config.run.seed, "rehearsal"))
    ways = guest.rehearsed()  # the last one is the slowest, and is measured

    def trial(rows: int, more: bool = learns, guest: Frozen = ways[-1]) -> float:
        windows, at = [], 0
        for start, stop, first in widest.windows[:rows]:
            windows.append(Window(at, at + stop - start, at + first - start))
            at += stop - start + 1
        tokens = rng.integers(BOS + 1, config.data.vocab_size, at)
        scratch = Referee(Validation(tokens, tokens, 1, True), config, world, clock, EVALUATORS[kind].within)
        scratch.packed = guest.packed
        began = clock()
        scratch.play(guest, (0, 0), (Round(windows, True, len(windows) if more else 0),))
        if world.device.type == "cuda":
            torch.cuda.synchronize()
        return clock() - began

    def median(rows: int) -> float:
        return statistics.median(max(world.each(trial, [rows] * world.lanes)) for _ in range(3))

    # One row first: else a compiled graph takes the number of rows for a constant.
    for way, rows, more in itertools.product(ways, sorted({1, len(widest.windows)}), {learns, False}):
        trial(rows, more, way)
    small, full, rows = median(1), median(len(widest.windows)), len(widest.windows)
    length = widest.positions() // rows
    position = max(full - small, 0.0) / (length * (rows - 1)) if rows > 1 else full / length
    return Pace(*world.same((max(small - position * length, 0.0), position)))


def shrink_to_fit(config: Config, tokens: np.ndarray, paces: Mapping[str, Pace], workers: int, seconds: float
                  ) -> tuple[dict[str, Any], dict[str, float]]:
    """Settings to change so that all evaluators fit into the seconds, and the forecast with them; where nothing fits,
    the cheapest there are. The dearest evaluator that can give way does so first."""
    changes: dict[str, Any] = {}
    while True:
        forecast = {kind: pace.seconds(EVALUATORS[kind].plan(tokens, config), workers) for kind, pace in paces.items()}
        steps = {kind: step for kind in paces if (step := EVALUATORS[kind].shrink(config))}
        if sum(forecast.values()) <= seconds or not steps:
            return changes, forecast
        step = steps[max(steps, key=lambda kind: forecast[kind])]
        changes, config = changes | step, with_settings(config, step)


def document_table(val: Validation, scores: Mapping[str, Score]) -> dict[str, np.ndarray]:
    """For the pictures: targets, bytes and nats by document (documents,), and the same by position in the document, in
    bins that double: bin i holds the targets 2^i .. 2^(i+1) - 1 tokens behind their BOS."""
    starts = np.flatnonzero(val.tokens == BOS)
    owner = np.searchsorted(starts, np.arange(len(val.tokens) - 1), side="right") - 1
    place = np.log2(np.arange(1, len(val.tokens)) - starts[owner]).astype(np.int64)
    table = {}
    for name, index in (("document", owner), ("position", place)):
        table[f"{name}_targets"] = np.bincount(index)
        table[f"{name}_bytes"] = np.bincount(index, val.bytes[1:])
        for kind, found in scores.items():
            table[f"{name}_nats_{kind}"] = np.bincount(index, found.by_target[1:])
    return table


# ==== 14 MAIN ===============================================================================================
# The stages of a run, each reading only the run folder, and the command line. A run folder can be re-scored
# or re-squeezed without training; a killed run continues under its old name. Exit codes: 0 done, 2 a mistake
# in the input, 3 a failed check, 1 a fault of the program. To add a stage: write a function on Run and a row
# in STAGES.


def used_rows(config: Config) -> dict[str, set[str]]:
    """Table -> keys of the rows that this recipe can reach; the packer drops the others. It must not depend on seed,
    paths or stages: one recipe, one packed file. A table that is not named stays whole."""
    policy = [row for name, row in (*parse_policy(config.artifact.policy), *standard_policy(config.artifact))
              if name != "factor" or config.model.hgf_rank]
    named = {field: {row[field] for row in policy if field in row} for field in ("format", "solver", "codec")}
    factors = {LEFT_FACTOR.format, RIGHT_FACTOR.format} if config.artifact.lqer_rank else set()
    auto = set(AUTO_CODECS) if "auto" in config.artifact.codec else set()
    trits = {"3", "s"} if "ternary" in named["format"] else set()
    letters = letters_of(config.model.stack)
    return {"PRESETS": {config.run.preset}, "OVERLAYS": {config.run.overlay} - {""},
            "FORMATS": named["format"] | factors, "SOLVERS": {"nearest", *named["solver"]},
            "CODECS": {*config.artifact.codec, *named["codec"], *auto} - {"auto"}, "LAYOUTS": {"r", "c", "b", *trits},
            "REFINEMENTS": set(squeeze_steps(config.artifact)) & set(REFINEMENTS),
            "CORRECTIONS": set(squeeze_steps(config.artifact)) & set(CORRECTIONS),
            "MIXERS": letters, "KERNELS": set(kernels_of(config.model)),
            "STARTS": {*(["decay", "pace"] if letters & {"G", "K"} else []), *(["forget"] if "X" in letters else []),
                       *(["position"] if config.model.loop_instructions == "position" else [])},
            "TOKEN_PARTS": set(token_parts(config.model)), "BETWEEN": set(between(config.model)),
            "HOLDS": {config.model.loop_state} - {"none"},
            "ATTN_GATES": {config.model.attn_gate} - {"none"},
            "FINAL_LANES": {config.model.parallel_final_lane},
            "MUON_BACKENDS": {config.optim.muon_backend}, "ACTIVATIONS": {config.model.mlp_act},
            "UPDATES": {config.optim.matrix_optimizer, config.optim.other_optimizer,
                        *(["sign"] if has_experts(config.model) else [])},
            "ENDINGS": {*(["retrieval"] if config.model.retrieval_bits else []),
                        *(["grammar"] if config.model.grammar_bias else [])},
            "FEEDS": {"experts"} & set(kernels_of(config.model)) | {"whole"},
            "LEARNERS": {"written"} & set(kernels_of(config.model)),
            "STEERINGS": {steering_of(config.optim)} - {""},
            "ESTIMATORS": {config.optim.matrix_optimizer} & set(ESTIMATORS),
            "EVALUATORS": {"contiguous", *config.eval.eval},
            "GATES": {config.ngram.ngram_gate} if "ngram" in config.eval.eval else set(),
            "TEACHERS": teachers_of(config)}


def check_rows(config: Config) -> None:
    """Look every row up that the run will need, before any work: in a packed file one may be missing."""
    tables = {"FORMATS": FORMATS, "SOLVERS": SOLVERS, "CODECS": CODECS, "MIXERS": MIXERS, "EVALUATORS": EVALUATORS,
              "MUON_BACKENDS": MUON_BACKENDS, "GATES": GATES, "TEACHERS": TEACHERS, "REFINEMENTS": REFINEMENTS,
              "CORRECTIONS": CORRECTIONS, "TOKEN_PARTS": TOKEN_PARTS, "ATTN_GATES": ATTN_GATES,
              "FINAL_LANES": FINAL_LANES, "KERNELS": KERNELS, "STARTS": STARTS,
              "BETWEEN": BETWEEN, "HOLDS": HOLDS, "UPDATES": UPDATES, "FEEDS": FEEDS, "LEARNERS": LEARNERS,
              "ENDINGS": ENDINGS,
              "ACTIVATIONS": ACTIVATIONS, "STEERINGS": STEERINGS, "ESTIMATORS": ESTIMATORS}
    for name, table in tables.items():
        for key in sorted(used_rows(config)[name]):
            table[key]


def needs_calibration(routes: Mapping[str, Route], settings: ArtifactSettings) -> bool:
    """Whether anything in the squeeze asks for the moments of inputs or gradients."""
    return any(route.solver == "gptq" for route in routes.values()) or bool(
        squeeze_steps(settings) or settings.prune_ones)


def make_skeleton(config: Config) -> GPT:
    """The configured network without memory for its parameters: names, shapes, roles."""
    kernels, _ = pick_kernels("reference", torch.device("cpu"), settings=config.model)
    with torch.device("meta"):
        model = GPT(config.model, config.data.vocab_size, kernels, torch.float32)
    check_roles(model)
    return model


def check_squeeze(config: Config) -> None:
    """ConfigError, before any work, for a squeeze that could not be carried out: a codec that is missing, a row of
    POLICY that matches nothing, a solver without its calibration."""
    settings, model = config.artifact, make_skeleton(config)
    pick_codecs(settings.codec)
    for pattern, fields in parse_policy(settings.policy):
        if not any(pattern == p.role or fnmatch.fnmatchcase(name, pattern) for name, p in model.named_parameters()):
            raise ConfigError(f"POLICY={settings.policy}: {pattern} matches no role ({', '.join(ROLES)}) and no "
                              "parameter (blocks.0.mlp.up.weight is one)")
        if "codec" in fields:
            pick_codecs((fields["codec"],))
    stages, routes, sites = config.run.stages, routes_of(model, settings), weight_sites(model)
    blind = [name for name, route in routes.items() if route.solver == "gptq" and name not in sites]
    if blind:
        raise ConfigError(f"POLICY={settings.policy}: solver=gptq for {blind[0]}, which multiplies no input; "
                          "name matrices only, as in blocks.0.*.weight")
    if settings.allocate and not any(can_stretch(routes[name]) for name in sites):
        raise ConfigError(f"ALLOCATE=1: needs a matrix or embedding on an int or uint grid; MATRIX_FORMAT="
                          f"{settings.matrix_format}, EMBED_FORMAT={settings.embed_format}")
    if "train" in stages and "write" in stages and needs_calibration(routes, settings) and (
            "calibrate" not in stages[:stages.index("write")]):
        raise ConfigError(f"STAGES={','.join(stages)}: the squeeze needs a calibration; put calibrate before write")


def load_tool(tools_path: str, name: str, asked: str) -> Any:
    """The module tools/<name>.py; ConfigError, with the setting that asked for it, where it is absent."""
    path = Path(tools_path) / f"{name}.py"
    if not path.exists():
        raise ConfigError(f"{asked}=1: needs {path}, which is not there; TOOLS_PATH names its folder, {asked}=0 goes "
                          "on without it")
    spec = importlib.util.spec_from_file_location(f"sixteen_{name}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def pack_self(config: Config) -> bytes:
    """The packed form of this readable file for a configuration."""
    source = Path(__file__).read_bytes()
    packer = load_tool(config.run.tools_path, "pack", "PACK")
    try:
        return packer.pack_source(source.decode(), baked(config),
                                  packer.provenance_line(source, Path(__file__).resolve().parent), used_rows(config))
    except packer.PackError as error:
        raise ConfigError(f"PACK=1: {error}") from None


class Run:
    """One launch: configuration, ranks, log, run folder, and the growing content of result.json."""

    def __init__(self, config: Config, world: World, threads: int, compiled: bool) -> None:
        self.config, self.world, self.threads, self.compiled = config, world, threads, compiled
        name = config.run.run_id or f"{config.run.preset}_{time.strftime('%Y%m%d-%H%M%S')}"
        self.folder = Path(config.run.runs_path) / world.same(name)
        fresh = "train" in config.run.stages or not config.run.from_
        self.source = self.folder if fresh else Path(config.run.from_)
        self.result: dict[str, Any] = {}
        self.unsealed = False  # whether result.json has what the log does not know of
        self.clock = time.monotonic
        fault = ""
        if world.first:
            try:
                self._open_folder()
            except (ConfigError, OSError) as error:
                fault = str(error) if isinstance(error, ConfigError) else user_line(error, str(self.folder))
        if fault := world.same(fault):
            raise ConfigError(fault)
        if not all(world.gather((self.folder / "config.json").exists())):
            raise ConfigError(f"RUNS_PATH={config.run.runs_path}: must be on a file system that all nodes share")
        self.log = Log(self.folder if world.first else None, self.clock)
        self.dtype = pick_dtype(config.system.compute_dtype, world.device)
        self.kernels, self.kernel_lines = pick_kernels(config.system.kernels, world.device, self.dtype, config.model)
        self.dataset: Data | None = None
        self.grammar: np.ndarray | None = None  # what tokens open, where the model has a part that asks

    def _open_folder(self) -> None:
        """Make the folder, or check that an old one belongs to the same settings; keep config.json and the script.

        A run folder belongs to one configuration and one source, so that nothing in it can be mistaken for another's.
        One that a mistake in the input ended before it held anything is free to be used again.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        path, code = self.folder / "config.json", self.folder / "train_gpt.py"
        values = {name: list(value) if isinstance(value, tuple) else value
                  for name, value in self.config.flat().items()}
        kept = ("checkpoint.pt", "artifact.bin", "result.json", "replay.bin")
        used = any((self.folder / name).exists() for name in kept)
        if path.exists() and used:
            old = read_json_object(path, f"RUN_ID={self.folder.name}").get("settings", {})
            changed = [f"{name}={old.get(name)} -> {value}" for name, value in values.items()
                       if (SETTINGS[name][1].metadata["scope"] != "run" or name == "FROM") and old.get(name) != value]
            if changed:
                raise ConfigError(f"RUN_ID={self.folder.name}: that run had other settings ({'; '.join(changed[:4])}); "
                                  "use another RUN_ID, or FROM= to go on from it")
        kept = self.folder / "result.json"
        if kept.exists():
            self.result = read_json_object(kept, f"RUN_ID={self.folder.name}")
        elif self.source != self.folder and (self.source / "result.json").exists():
            before = read_json_object(self.source / "result.json", f"FROM={self.source}")
            self.result = {key: before[key] for key in ("train", "artifact") if key in before}
        if not (path.exists() and used):
            write_json(path, {"settings": values, "config_hash": self.config.digest(),
                              "world": environment_facts(self.world, self.threads)})
        if not (code.exists() and used):
            write_atomic(code, Path(__file__).read_bytes())
        self.other_code = sha256_file(code) != sha256_file(__file__)

    def data(self) -> Data:
        """The dataset, loaded and checked once."""
        if self.dataset is None:
            began = self.clock()
            self.dataset = load_data(self.config.data, self.world)
            val = self.dataset.val
            self.log.line(f"val_loader:shards path={self.config.data.data_path} tokens:{len(val.tokens) - 1}")
            self.log.line(f"val_tokens: {len(val.tokens) - 1} val_bytes:{val.bytes.sum()} "
                          f"val_documents:{val.documents} tokenizer:{'lossless' if val.lossless else 'lossy'}")
            if not val.lossless:
                size = self.dataset.manifest["val"].get("bytes")
                self.log.line(f"declared: the tokenizer is lossy; scored are {val.bytes.sum()} bytes, what it decodes "
                              f"to; its documents have {'an unknown number' if size is None else size}")
            if common := self.dataset.manifest["disjoint"]["common"]:
                self.log.line(f"declared: {common} validation documents also stand in the published training shards")
            if self.config.model.grammar_bias:
                self.grammar = ENDINGS["grammar"].facts_of(self.dataset.tokenizer)
                self.log.line(ENDINGS["grammar"].told(self.grammar[np.unique(val.tokens)]))
            self.log.line(f"train_shards: {len(self.dataset.train.shards)} train_tokens:{len(self.dataset.train)} "
                          f"checked_in:{self.clock() - began:.1f}s")
        return self.dataset

    def new_model(self) -> GPT:
        """The configured network on the device, its parameters not yet filled."""
        model = GPT(self.config.model, self.config.data.vocab_size, self.kernels, self.dtype)
        check_roles(model)
        if model.grammar is not None:
            self.data()
            model.grammar.facts.copy_(torch.from_numpy(self.grammar))
        return model.to(self.world.device)

    def score(self, kind: str, model: GPT, phase: int = -1) -> Score:
        """One evaluator's score of a model, as a diagnostic."""
        guest = make_guest(kind, model, self.config, self.world, phase)
        return score(kind, guest, self.data().val, self.config, self.world, self.clock)

    def keep(self, **parts: Any) -> None:
        """Put parts into result.json, at once."""
        self.result |= parts
        self.unsealed = True
        if self.world.first:
            write_json(self.folder / "result.json", self.result)

    def pinned(self) -> dict[str, Any]:
        """The settings that an earlier EVAL_SHRINK chose for this run or for the one it comes from; words win."""
        kept: dict[str, Any] = {}
        for folder in (self.source, self.folder):
            path = folder / "config.json"
            kept |= read_json_object(path, str(folder)).get("eval_shrunk", {}) if path.exists() else {}
        return {name: value for name, value in kept.items()
                if self.config.origins.get(name) not in ("environment", "argument")}

    def pin(self, changes: Mapping[str, Any]) -> None:
        """Keep what EVAL_SHRINK chose in config.json."""
        if self.world.first:
            path = self.folder / "config.json"
            held = read_json_object(path, str(path))
            write_json(path, held | {"eval_shrunk": {**held.get("eval_shrunk", {}), **changes}})
        self.world.barrier()

    @functools.cached_property
    def code_bytes(self) -> int:
        """Bytes of the script that counts: the packed file that runs, or what it would be where the readable one
        does."""
        if BAKED or not (Path(self.config.run.tools_path) / "pack.py").exists():
            return Path(__file__).stat().st_size
        return len(pack_self(self.config))


def stage_train(run: Run) -> None:
    """Train, or find that training was finished; leaves checkpoint.pt."""
    began = run.clock()
    model = run.new_model()
    init_weights(model, run.config.run.seed)

    def score_float(phase: int) -> tuple[float, float]:
        found = run.score("contiguous", model, phase)
        return found.nats / found.tokens, bits_per_byte(found.nats, found.bytes)

    trainer = Trainer(run.config, model, run.data(), run.world, run.log, run.folder, run.compiled, score_float,
                      functools.partial(rehearse_squeeze, run, model), began)
    finished_before = trainer.resume()
    part = trainer.run()
    earlier = run.result.get("train", {}).get("strict_seconds", 0.0)
    run.keep(train={**part, "strict_seconds": earlier if finished_before else trainer.strict_seconds()})


def exported_weights(run: Run, held: Checkpoint) -> dict[str, Tensor]:
    """What training ended with, as its forward used it: the average where there is one, projected where QAT was on."""
    weights = held.average or held.weights
    if run.config.artifact.qat_start == 1 or run.config.artifact.qat_kind == "noise":
        return weights
    model = run.new_model()
    routes, stored = routes_of(model, run.config.artifact), qat_parts(model, run.config.artifact)
    return {name: project(weight, routes[name]) if name in stored else weight for name, weight in weights.items()}


def finished_checkpoint(run: Run) -> Checkpoint:
    """The checkpoint of a finished training; ConfigError where there is none."""
    path, stages = run.source / "checkpoint.pt", ",".join(run.config.run.stages)
    estimator, log = ESTIMATORS.get(run.config.optim.matrix_optimizer), path.with_name("replay.bin")
    if not path.exists() and estimator is not None and log.exists():
        return estimator.rebuild(run.config, run.new_model(), log, run.world)
    if not path.exists():
        raise ConfigError(f"STAGES={stages}: needs {path}, which is not there")
    held = load_checkpoint(path)
    if not held.finished:
        raise ConfigError(f"STAGES={stages}: the training of {path} is not finished")
    return held


def collect(run: Run, model: GPT, rows: Batches, count: int) -> tuple[Calibration, bytes]:
    """The moments that the squeeze wants, over `count` micro-batches of `rows`, and the content of hessians.pt. With
    GPTQ_SEQUENTIAL or LOOP_AWARE_GPTQ matrices of the model are afterwards as they will be stored."""
    settings, train, seed = run.config.artifact, run.config.train, rows.seed

    def batch(index: int) -> Batch:
        if settings.gptq_calibration_text == "train":
            return rows.micro(index, run.world)
        return sample_text(model, index, train.micro_batch_tokens // train.train_seq_len, train.train_seq_len, seed,
                           run.world)

    sites, routes = weight_sites(model), routes_of(model, settings)
    # One step with every site at once; or first what stands outside of ( ) groups, then the groups on what comes from
    # there in its stored form; or block by block with all that was solved before.
    steps = [list(sites)]
    if settings.loop_aware_gptq:
        inside = {f"blocks.{step.block}." for step in model.phases[-1].steps if step.turn}
        looped = [name for name in sites if name.startswith(("loops.", *inside))]
        steps = [[name for name in sites if name not in looped], looped]
    if settings.gptq_sequential:
        blocks = dict.fromkeys(".".join(name.split(".")[:2]) if name.startswith("blocks.") else name
                               for name in sorted(sites, key=lambda name: sites[name][0] == "head"))
        steps = [[name for name in sites if name == block or name.startswith(f"{block}.")] for block in blocks]
    batches = {index: batch(index) for index in range(run.world.rank, count, run.world.size) or [0]}
    found = Calibration({}, {}, 0)
    for names in steps:
        part = calibrate(model, batches.__getitem__, count, run.world, [site for name in names for site in sites[name]])
        found = Calibration({**found.inputs, **part.inputs}, {**found.slopes, **part.slopes}, part.tokens)
        if names is not steps[-1]:  # what comes after is calibrated on their stored form
            own = dict(model.named_parameters())
            solved = solve_all({name: own[name].detach() for name in names}, routes, found, sites, settings, run.world)
            with torch.no_grad():
                for name in names:
                    own[name].copy_(solved[name].decoded)
    buffer = io.BytesIO()
    if run.world.first:
        torch.save({site: tensor.cpu() for site, tensor in found.inputs.items()}
                   | {f"slope {site}": tensor.cpu() for site, tensor in found.slopes.items()}
                   | {"tokens": torch.tensor(found.tokens)}, buffer)
    return found, buffer.getvalue()


RESERVE_MARGIN = 1.5  # on the rehearsed seconds: a shared machine may be slower when they are needed


def rehearse_squeeze(run: Run, model: GPT) -> tuple[float, float]:
    """Seconds to keep for the calibration, from half of its rounds on random tokens and a copy of the model, taken for
    the other half too (the difference of one and two rounds was too little by half on a shared machine); and with
    STRICT_CLOCK those of writing, from one build of the artifact of untrained weights."""
    config, world = run.config, run.world
    calibrated = "calibrate" in config.run.stages and needs_calibration(routes_of(model, config.artifact),
                                                                       config.artifact)
    if not config.train.max_wallclock_seconds or not (calibrated or config.train.strict_clock):
        return 0.0, 0.0
    rng = np.random.default_rng(stream_seed(config.run.seed, "rehearsal"))
    shard = rng.integers(BOS + 1, config.data.vocab_size, 4 * config.train.micro_batch_tokens)
    rows = Batches(TokenStream([shard]), config.data, config.train, 0, model.packed)
    workers, found, path = world.size * world.lanes, None, run.folder / ".rehearsal.pt"
    # Of the start's weights some are zero, and pass no gradient on: all are filled as training fills them.
    generator = torch.Generator(world.device).manual_seed(0)
    weights = {name: torch.empty_like(p).normal_(std=0.02, generator=generator) for name, p in model.named_parameters()}
    began = run.clock()
    if world.first:
        # As large as a checkpoint, which training ends with and the calibration reads before it begins.
        torch.save([weights, *({name: weight.clone() for name, weight in weights.items()} for _ in range(2))], path)
    world.barrier()
    saving = run.clock() - began

    def spent(rounds: int) -> float:
        nonlocal found
        began, other = run.clock(), run.new_model()
        load_tensors(path, "cpu", "delete it")
        load_weights(other, weights, "rehearsal")
        found, content = collect(run, other, rows, rounds * workers)
        if world.first:
            write_atomic(path.with_suffix(".moments"), content)
        return run.clock() - began

    reserve = writing = 0.0
    if calibrated:
        spent(1)
        rounds = -(-config.artifact.gptq_calibration_batches // workers)
        half = -(-rounds // 2)
        reserve = RESERVE_MARGIN * spent(half) * rounds / half
    if config.train.strict_clock and "write" in config.run.stages:
        began = run.clock()
        Squeeze(run, weights, model, found).build(None)
        writing = RESERVE_MARGIN * (saving + (run.clock() - began) * (FIT_PASSES if config.artifact.fit else 1))
    world.barrier()
    if world.first:
        for left in (path, path.with_suffix(".moments")):
            left.unlink(missing_ok=True)
    return reserve, writing


def stage_calibrate(run: Run) -> None:
    """Watch the exported weights at work and leave hessians.pt; its seconds count as training."""
    settings, began = run.config.artifact, run.clock()
    model = run.new_model()
    if not needs_calibration(routes_of(model, settings), settings):
        run.log.line("calibrate: nothing in the squeeze needs it")
        run.keep(train={**run.result.get("train", {}), "calibrate_seconds": 0.0})
        return
    load_weights(model, exported_weights(run, finished_checkpoint(run)), f"FROM={run.source}")
    rows = Batches(run.data().train, run.config.data, run.config.train,
                   stream_seed(run.config.run.seed, "calibration"), model.packed)
    found, content = collect(run, model, rows, settings.gptq_calibration_batches)
    if run.world.first:
        write_atomic(run.folder / "hessians.pt", content)
    seconds = run.world.same(run.clock() - began)
    run.log.line(f"calibrate: {found.tokens} tokens of {settings.gptq_calibration_text} text at {len(found.inputs)} "
                 f"sites{' block by block' if settings.gptq_sequential else ''} in {seconds:.1f}s, counted as training")
    run.keep(train={**run.result.get("train", {}), "calibrate_seconds": seconds})


def load_calibration(run: Run) -> Calibration | None:
    """hessians.pt of this run or of the one it comes from; None where there is none."""
    for path in (run.folder / "hessians.pt", run.source / "hessians.pt"):
        if path.exists():
            held = load_tensors(path, run.world.device, "STAGES=calibrate makes it again")
            slopes = {site.removeprefix("slope "): held.pop(site) for site in list(held) if site.startswith("slope ")}
            tokens = int(held.pop("tokens"))
            run.log.line(f"calibration:{path} of {tokens} tokens")
            return Calibration(held, slopes, tokens)
    return None


class Built(NamedTuple):
    """One model as it would be written: its bytes, what every tensor took, the output errors of matrices with several
    visits, the hash of the weights that a reader must get, the codes of ternary weights and their bytes."""
    data: bytes
    entries: list[Entry]
    visits: dict[str, dict[str, float]]
    digest: str
    trits: list[np.ndarray]
    trit_bytes: float


class Squeeze:
    """The squeeze of one set of weights: solves, corrects, codes; asked by the fit for one size after the other."""

    def __init__(self, run: Run, weights: dict[str, Tensor], model: GPT, calibration: Calibration | None = None
                 ) -> None:
        self.run, self.weights, self.settings = run, weights, run.config.artifact
        self.roles = {name: parameter.role for name, parameter in model.named_parameters()}
        self.routes, self.sites = routes_of(model, self.settings), weight_sites(model)
        self.calibration = calibration or load_calibration(run)
        if needs_calibration(self.routes, self.settings) and self.calibration is None:
            raise ConfigError(f"STAGES={','.join(run.config.run.stages)}: the squeeze needs a calibration; put "
                              "calibrate before write")
        self.corrections = [name for name in squeeze_steps(self.settings) if name not in REFINEMENTS]
        for name in squeeze_steps(self.settings):
            if name in REFINEMENTS:
                self.routes = REFINEMENTS[name](weights, self.routes, self.calibration, self.sites, self.settings)
        self.facts = artifact_facts(run.config.model, run.config.data.vocab_size, run.data().tokenizer_sha256,
                                    run.grammar)
        self.codecs, _ = pick_codecs(self.settings.codec)
        self.built: dict[int, Built] = {}

    def build(self, log_factor: float | None) -> int:
        """Solve and code everything with the free steps times exp(log_factor) (None: as the policy says); the size of
        the model in bytes, the same on all ranks."""
        routes = self.routes if log_factor is None else stretched(self.routes, log_factor)
        solved = solve_all(self.weights, routes, self.calibration, self.sites, self.settings, self.run.world)
        factors: dict[str, Stored] = {}
        for name in self.corrections:
            factors |= CORRECTIONS[name](self.weights, solved, self.calibration, self.sites, self.settings)
        size = 0
        if self.run.world.first:
            stored = {name: row.stored for name, row in solved.items()} | factors
            data, spent = pack_artifact(stored, self.facts, self.codecs)
            visits = {name: row.visits for name, row in solved.items() if len(row.visits) > 1}
            size = len(data)
            ternary = [name for name, row in solved.items() if row.stored.route.format == "ternary"]
            self.built[size] = Built(data, [self.entry(name, row, spent) for name, row in solved.items()], visits,
                                     weights_digest({name: row.decoded for name, row in solved.items()}),
                                     [solved[name].stored.coded.codes.numpy() for name in ternary],
                                     sum(spent[name][1] - spent[name][2] for name in ternary))
        return self.run.world.same(size)

    def entry(self, name: str, row: Solved, spent: Mapping[str, tuple[str, float, float]]) -> Entry:
        """The printed row of one tensor; the factors that correct it are counted with it."""
        factors = [spent[factor][1] for factor in (f"{name} left", f"{name} right") if factor in spent]
        codec, size, scales = spent[name]
        return Entry(name, self.roles[name], row.stored.route.format + ("+lqer" if factors else ""),
                     row.stored.route.solver, codec, self.weights[name].numel(), size + sum(factors), scales, row.error,
                     max(row.visits.values(), default=math.nan), row.cost)

    def fit(self, room: int) -> Fit:
        """Fit the model into `room` bytes."""
        fixed = sum(FORMATS[self.routes[name].format].bits / 8 * weight.numel() for name, weight in self.weights.items()
                    if not can_stretch(self.routes[name]))
        rows = max(64, (1 << 21) // max(1, sum(weight.shape[-1] for weight in self.weights.values())))

        def estimate(at: float) -> float:
            return self.run.world.same(fixed + estimate_bytes(self.weights, stretched(self.routes, at), rows))

        return fit_steps(estimate, self.build, room,
                         self.run.world.same(least_log_factor(self.weights, self.routes)))


def artifact_label(settings: ArtifactSettings) -> str:
    """Format and codec in the challenge's closing lines."""
    kind = settings.matrix_format
    return f"{kind}{settings.matrix_bits if kind in ('int', 'uint') else ''}+{'+'.join(settings.codec)}"


def squeeze_table(entries: list[Entry]) -> list[str]:
    """What every tensor took and cost, dearest first, with the sum by role."""
    lines = [f"{'tensor':<32} {'role':<10} {'format':<11} {'solver':<8} {'codec':<8} {'weights':>10} {'bytes':>10} "
             f"{'bits':>6} {'error':>8} {'output':>8} {'cost':>10}"]
    for row in sorted(entries, key=lambda row: -row.bytes):
        lines.append(f"{row.name:<32} {row.role:<10} {row.format:<11} {row.solver:<8} {row.codec:<8} {row.weights:>10} "
                     f"{row.bytes:>10.0f} {8 * row.bytes / row.weights:>6.2f} {row.error:>8.5f} "
                     + (f"{'-':>8} {'-':>10}" if math.isnan(row.cost) else
                        f"{row.hessian_error:>8.5f} {row.cost:>10.2e}"))
    for role in dict.fromkeys(row.role for row in entries):
        own = [row for row in entries if row.role == role]
        size, weights = sum(row.bytes for row in own), sum(row.weights for row in own)
        lines.append(f"{'all of ' + role:<32} {'':<10} {'':<11} {'':<8} {'':<8} {weights:>10} {size:>10.0f} "
                     f"{8 * size / weights:>6.2f} of which scales {sum(row.scale_bytes for row in own):.0f}")
    return lines


def trit_bits(trits: list[np.ndarray], size: float) -> dict[str, float]:
    """Bits a ternary weight, scales apart, from the codes and the bytes they took: in the file; the zeroth-order
    entropy, which a coder that looks around can go below, and its share of the file's (Shannon efficiency); five a
    byte, and these through zlib. {} without any."""
    count = sum(map(np.size, trits))
    if not count:
        return {}
    packed = base3_pack([codes.reshape(len(codes), -1) for codes in trits], -1, 1)
    entropy = entropy_bits(np.concatenate([codes.ravel() for codes in trits])) / count
    coded = 8 * size / count
    return {"coded": coded, "entropy": entropy, "efficiency": entropy / coded, "base3": 8 * len(packed) / count,
            "base3_zlib": 8 * len(zlib.compress(packed, 9)) / count}


def stage_write(run: Run) -> None:
    """Squeeze the exported weights of checkpoint.pt into artifact.bin. All ranks solve; rank 0 codes and writes."""
    # Known at once in a packed file; what a readable one takes to pack itself for the count is no work of the run's.
    code = run.world.same(run.code_bytes if run.world.first else 0)
    began, settings = run.clock(), run.config.artifact
    _, missing = pick_codecs(settings.codec)
    if missing:
        run.log.line(f"codec:auto without {', '.join(missing)} (not installed)")
    held = finished_checkpoint(run)
    model = run.new_model()
    load_weights(model, held.average or held.weights, f"FROM={run.source}")
    squeeze = Squeeze(run, {name: parameter.detach() for name, parameter in model.named_parameters()}, model)
    fit = squeeze.fit(settings.target_bytes - code) if settings.fit else Fit(0.0, squeeze.build(None), 1, "FIT=0")
    if not run.world.first:
        return
    data, entries, visits, digest, trits, trit_bytes = squeeze.built[fit.size]
    save_artifact(run.folder / "artifact.bin", data)
    for entry in entries:
        run.log.event("tensor", **{key: None if value != value else value for key, value in entry._asdict().items()},
                      visits=visits.get(entry.name))
    for line in squeeze_table(entries):
        run.log.line(line)
    told = trit_bits(trits, trit_bytes)
    if told:
        run.log.line("bits a trit: in the file {coded:.4f}, entropy by itself {entropy:.4f} (efficiency "
                     "{efficiency:.4f}), five a byte {base3:.4f}, that with zlib {base3_zlib:.4f}; at most log2 3 = "
                     "1.5850. They are bits a weight, not bits a byte of text".format(**told))
    for name, errors in visits.items():
        run.log.line(f"visits of {name}: output error "
                     + " ".join(f"{site} {error:.5f}" for site, error in errors.items()))
    total, label = len(data) + code, artifact_label(settings)
    if settings.fit:
        left = settings.target_bytes - total
        run.log.line(f"fit: {fit.reason} after {fit.passes} passes; steps times {math.exp(fit.log_factor):.4f}; "
                     f"{left} bytes of TARGET_BYTES={settings.target_bytes} unused")
    run.log.line(f"Serialized model {label}: {len(data)} bytes")
    run.log.line(f"Code size: {code} bytes" + ("" if BAKED else " (packed; PACK=0 runs the readable file)"))
    run.log.line(f"Total submission size {label}: {total} bytes")
    forecast = sum(forecast_fitted(model, settings, code).values())
    run.keep(artifact={"model_bytes": len(data), "code_bytes": code, "total_bytes": total,
                       "limit_bytes": settings.target_bytes, "sha256": hashlib.sha256(data).hexdigest(),
                       "weights_sha256": digest,
                       "bits_per_weight": 8 * len(data) / sum(entry.weights for entry in entries),
                       "scale_bytes": round(sum(entry.scale_bytes for entry in entries)),
                       "cost_nats": sum(entry.cost for entry in entries if entry.cost == entry.cost),
                       **({"bits_per_trit": told} if told else {}),
                       "fit_passes": fit.passes if settings.fit else 0, "step_factor": math.exp(fit.log_factor),
                       "forecast_bytes": round(forecast) + code, "packed": bool(BAKED),
                       "write_seconds": run.clock() - began})


def _loaded(run: Run) -> GPT:
    """The model of the artifact on disk, and nothing else."""
    path = run.folder / "artifact.bin"
    if run.source != run.folder and "write" not in run.config.run.stages and run.world.first:
        try:
            write_atomic(path, (run.source / "artifact.bin").read_bytes())
        except FileNotFoundError:
            raise ConfigError(f"FROM={run.source}: has no artifact.bin") from None
    run.world.barrier()
    facts, weights = load_artifact(path)
    if facts.get("tokenizer_sha256") != run.data().tokenizer_sha256:
        raise ConfigError(f"DATA_PATH={run.config.data.data_path}: {path} was trained with another tokenizer")
    # Scoring needs no gradient of a weight; without this, test-time training would make them all.
    return make_model_from(facts, weights, run.kernels, run.dtype, path).to(run.world.device).requires_grad_(False)


def stage_reload(run: Run) -> None:
    """Read the artifact back and prove that it holds exactly the weights that the write stage put in; after training
    with QAT, exactly those the forward was trained with where nothing but rounding chose the codes."""
    began = run.clock()
    model = _loaded(run)
    seconds = run.clock() - began
    weights = {name: parameter.detach().cpu() for name, parameter in model.named_parameters()}
    promised, compared = run.result.get("artifact", {}).get("weights_sha256"), "no promise to compare with"
    if run.world.first and promised:
        if weights_digest(weights) != promised:
            raise CheckError(f"{run.folder / 'artifact.bin'}: reading it back gives other weights than were written")
        compared = "equal to the weights that were written"
    artifact = run.config.artifact
    exact = artifact.qat_start < 1 and artifact.qat_kind == "stored"
    if run.world.first and exact and (run.source / "checkpoint.pt").exists():
        trained = exported_weights(run, load_checkpoint(run.source / "checkpoint.pt"))
        routes = routes_of(model, artifact)
        same = all(torch.equal(weights[name], trained[name]) for name in qat_parts(model, artifact))
        plain = ("write" in run.config.run.stages and not needs_calibration(routes, artifact)
                 and run.result.get("artifact", {}).get("step_factor") == 1)
        if plain and not same:
            raise CheckError("QAT_START: the artifact differs from the weights the forward was trained with")
        compared += ", and to those the forward was trained with" if same else ", steps or codes chosen after training"
    run.log.line(f"reloaded:{run.folder / 'artifact.bin'} in {seconds:.1f}s, {compared}")


def fit_evaluation(run: Run, config: Config, guests: Mapping[str, Frozen]) -> tuple[Config, dict[str, Pace]]:
    """Rehearse all evaluators, print how long each will take, and see that the budget holds them: exit 3 with settings
    that would fit, or, with EVAL_SHRINK, those settings, which config.json then keeps for every later evaluation.
    Returns the configuration to score with and the pace of each evaluator."""
    tokens, world, budget = run.data().val.tokens, run.world, config.eval.eval_budget_seconds
    workers, began = world.size * world.lanes, run.clock()
    paces = {kind: rehearse(kind, guest, EVALUATORS[kind].plan(tokens, config), config, world, run.clock)
             for kind, guest in guests.items()}
    spent = run.clock() - began
    _, forecast = shrink_to_fit(config, tokens, paces, workers, math.inf)
    total = sum(forecast.values())
    run.log.line(f"eval_forecast: {' '.join(f'{kind}:{seconds:.1f}s' for kind, seconds in forecast.items())} "
                 f"warm_up:{spent:.1f}s of EVAL_BUDGET_SECONDS={budget:g}")
    run.log.event("eval_forecast", seconds=forecast, warm_up=spent)
    # The forecast comes from a rehearsal; rank 0's clock decides for all.
    if not budget or world.same(total + spent) <= budget:
        return config, paces
    changes, after = shrink_to_fit(config, tokens, paces, workers, world.same(budget - spent))
    words, seconds = " ".join(f"{name}={show_value(value)}" for name, value in changes.items()), sum(after.values())
    if not changes or world.same(seconds + spent) > budget:
        raise CheckError(f"EVAL_BUDGET_SECONDS={budget:g}: the evaluation would take {total + spent:.0f} s, and "
                         f"{seconds + spent:.0f} s with the cheapest settings ({words or 'these'}); name fewer "
                         "evaluators in EVAL, or allow more seconds")
    if not config.eval.eval_shrink:
        raise CheckError(f"EVAL_BUDGET_SECONDS={budget:g}: the evaluation would take {total + spent:.0f} s; {words} "
                         f"would take {seconds + spent:.0f} s, and EVAL_SHRINK=1 takes them")
    run.log.line(f"EVAL_SHRINK: {words}, forecast {seconds:.1f}s; kept in config.json")
    run.pin(changes)
    return with_settings(config, changes), paces


def audit_evaluators(run: Run, config: Config, model: GPT) -> dict[str, Any]:
    """The verdict of tools/audit.py on each rule: pass and evidence, printed line by line."""
    tool = load_tool(config.run.tools_path, "audit", "AUDIT")
    parts = (CheckError, Validation, World, load_tokenizer, make_guest, score, targets_of, weights_digest,
             with_settings)
    golf = types.SimpleNamespace(BOS=BOS, EVALUATORS=EVALUATORS, DECLARED_MODES=DECLARED_MODES,
                                 **{part.__name__: part for part in parts})
    verdicts = tool.audit(golf, config, model, run.data(), config.eval.audit_tokens, run.clock)
    for rule, verdict in verdicts.items():
        run.log.line(f"audit: {rule} {'pass' if verdict['pass'] else 'FAIL'}: {verdict['evidence']}")
    return verdicts


def stage_evaluate(run: Run) -> None:
    """Score the artifact on disk with every evaluator, then, as a diagnostic, the float weights."""
    began = run.clock()
    model, val, scores = _loaded(run), run.data().val, {}
    config = with_settings(run.config, run.pinned())
    if pinned := run.pinned():
        run.pin(pinned)
        run.log.line(f"EVAL_SHRINK: as before, {' '.join(f'{name}={show_value(pinned[name])}' for name in pinned)}")
    guests = {kind: make_guest(kind, model, config, run.world, compiled=run.compiled)
              for kind in config.eval.eval}
    config, paces = fit_evaluation(run, config, guests)
    deadline = began + config.eval.eval_budget_seconds if config.eval.eval_budget_seconds else math.inf
    journals = run.folder / "journal"
    ledger: dict[str, Any] = {"updates": 0, "scored_once": True, "journals": {}}
    for kind, guest in guests.items():
        found = scores[kind] = score(kind, guest, val, config, run.world, run.clock, journals,
                                     deadline=deadline - sum(found.earlier for found in scores.values()),
                                     step_positions=paces[kind].step_positions())
        ledger |= {"targets": found.ledger["targets"], "updates": ledger["updates"] + found.ledger["updates"],
                   "scored_once": ledger["scored_once"] and found.ledger["scored_once"]}
        ledger["journals"][kind] = found.ledger["journal_sha256"]
        label = f"final_{artifact_label(config.artifact).replace('+', '_')}_{EVALUATORS[kind].label}"
        entry = found.entry()
        run.log.line(f"{label} val_loss:{entry['val_loss']:.4f} val_bpb:{entry['val_bpb']:.4f} "
                     f"eval_time:{found.seconds * 1000:.0f}ms")
        run.log.line(f"{label}_exact val_loss:{entry['val_loss']:.8f} val_bpb:{entry['val_bpb']:.8f}")
        run.log.event("score", evaluator=kind, **{key: entry[key] for key in entry if key != "documents"})
    seconds = run.clock() - began + sum(found.earlier for found in scores.values())
    audited = config.eval.audit and run.world.first
    verdicts = run.world.same(audit_evaluators(run, config, model) if audited else {})
    path = run.folder / "checkpoint.pt"
    if path.exists():
        held = load_checkpoint(path)
        load_weights(model, exported_weights(run, held), f"RUN_ID={run.folder.name}: {path}")
        scores["float"] = run.score("contiguous", model)
        entry = scores["float"].entry()
        run.log.line(f"diagnostic pre-quantization val_loss:{entry['val_loss']:.4f} val_bpb:{entry['val_bpb']:.4f}")
    ledger["journal_sha256"] = hashlib.sha256(" ".join(ledger["journals"].values()).encode()).hexdigest()
    run.log.line(f"ledger: targets:{ledger['targets']} scored_once:{ledger['scored_once']} "
                 f"updates:{ledger['updates']}")
    run.log.line(f"total_eval_time: {seconds:.1f}s")
    if run.world.first:
        table = io.BytesIO()
        np.savez_compressed(table, **document_table(val, scores))
        write_atomic(run.folder / "documents.npz", table.getvalue())
    run.keep(scores={kind: found.entry() for kind, found in scores.items()}, ledger=ledger, eval_seconds=seconds,
             audit=verdicts)
    if run.world.first:
        shutil.rmtree(journals, ignore_errors=True)
    if broken := [rule for rule, verdict in verdicts.items() if not verdict["pass"]]:
        raise CheckError(f"AUDIT=1: {', '.join(broken)}: see the lines above and audit in result.json")


def result_digest(result: Mapping[str, Any]) -> str:
    """sha256 of the content of a result.json, however it is written."""
    return hashlib.sha256(json.dumps(result, sort_keys=True).encode()).hexdigest()


def seal(run: Run) -> None:
    """Bind what result.json and the artifact are now into the log, and after a report into the receipt."""
    artifact = run.result.get("artifact", {}).get("sha256")
    run.log.event("result", artifact_sha256=artifact, result_sha256=result_digest(run.result))
    run.unsealed = False
    if run.world.first and "budget" in run.result:
        _tool(run, "receipt.py", *([run.config.run.sign_key] if run.config.run.sign_key else []))


def check_sign_key(run: Run) -> None:
    """ConfigError, before any work, where SIGN_KEY cannot sign; a key is made where there is none."""
    fault, path = "", Path(run.config.run.tools_path) / "receipt.py"
    if run.world.first and run.config.run.sign_key:
        done = subprocess.run([sys.executable, str(path), "--key", run.config.run.sign_key], capture_output=True,
                              text=True)
        fault = (done.stderr.strip() or f"SIGN_KEY: {path} failed").splitlines()[-1] if done.returncode else ""
    if fault := run.world.same(fault):
        raise ConfigError(fault)


def _tool(run: Run, name: str, *words: str) -> str | None:
    """Output of tools/<name> on the run folder; None, with a line that says so, where the tool is absent or fails."""
    path = Path(run.config.run.tools_path) / name
    if not path.exists():
        run.log.line(f"report: {path} is not there, so its part is missing")
        return None
    done = subprocess.run([sys.executable, str(path), str(run.folder), *words], capture_output=True, text=True)
    if done.returncode:
        run.log.line(f"report: {path} failed: {(done.stderr.strip() or 'no message').splitlines()[-1]}")
        return None
    return done.stdout


def stage_report(run: Run) -> None:
    """Yardsticks, budget, result.json, the picture, and the last table."""
    if not run.world.first:
        return
    config = run.config
    yardsticks = _tool(run, "yardsticks.py")
    val = run.data().val
    train, artifact = run.result.get("train", {}), run.result.get("artifact", {})
    calibration = train.get("calibrate_seconds", 0.0)
    strict = train.get("strict_seconds", 0.0) + calibration + artifact.get("write_seconds", 0.0)
    evaluation = run.result.get("eval_seconds", 0.0)
    limits = (config.train.max_wallclock_seconds, config.eval.eval_budget_seconds)
    spent = (train.get("seconds", 0.0) + calibration, evaluation)
    judged = (strict if config.train.strict_clock else spent[0], evaluation)
    ok = all(not limit or seconds <= limit for seconds, limit in zip(judged, limits, strict=True))
    manifest = run.data().manifest
    run.keep(preset=config.run.preset, overlay=config.run.overlay, seed=config.run.seed, config_hash=config.digest(),
             code_sha256=sha256_file(run.folder / "train_gpt.py"), **provenance(),
             environment=environment_facts(run.world, run.threads),
             data={"path": config.data.data_path, "source": manifest["source"],
                   "manifest_sha256": run.data().manifest_sha256,
                   "tokenizer_sha256": run.data().tokenizer_sha256, "lossless": val.lossless,
                   "val_documents": val.documents, "val_tokens": len(val.tokens) - 1,
                   "val_bytes": int(val.bytes.sum()), "val_document_bytes": manifest["val"].get("bytes"),
                   "train_tokens": len(run.data().train), "disjoint": manifest["disjoint"]},
             declared={"doc_isolation": config.data.doc_isolation, "packed": bool(BAKED),
                       "modes": declared_modes(config), "eval_shrunk": run.pinned()},
             yardsticks={name: value for name, value in json.loads(yardsticks).items()
                         if name in ("gzip", "zstd", "xz")} if yardsticks else {},
             budget={"train_seconds": spent[0], "strict_train_seconds": strict, "eval_seconds": evaluation, "ok": ok,
                     "strict_ok": not limits[0] or strict <= limits[0]})
    run.keep(alarms=find_alarms(run.result, config.data.vocab_size) if "scores" in run.result else [])
    seal(run)
    picture = _tool(run, "plot.py")
    for line in final_table(run.result, config):
        run.log.line(line)
    run.log.line(f"run folder: {run.folder}")
    if picture is not None:
        run.log.line(f"picture: {run.folder / 'curve.png'}")
    over = artifact.get("total_bytes", 0) - config.artifact.target_bytes
    if over > 0:
        raise CheckError(f"TARGET_BYTES={config.artifact.target_bytes}: code plus model are {over} bytes over it")
    if not ok:
        raise CheckError(f"budget: training {judged[0]:.1f} s of {limits[0]:g}, evaluation "
                         f"{evaluation:.1f} s of {limits[1]:g}")


# What lets earlier documents reach later ones: evaluator, when, and what to say of it.
DECLARED_MODES: tuple[tuple[str, Callable[[Config], bool], str], ...] = (
    ("ngram", lambda c: True, "EVAL=ngram: n-grams of earlier documents are mixed in"),
    ("ttt", lambda c: c.ttt.ttt_warm_start_a, "TTT_WARM_START_A=1: adapters begin as an earlier document left them"),
    ("ttt", lambda c: bool(c.ttt.phased_ttt_prefix_docs and c.ttt.global_ttt_lr),
     "PHASED_TTT_PREFIX_DOCS: the model learns from earlier documents"))


def declared_modes(config: Config) -> list[str]:
    """The modes of the evaluation that a strict reader wants to know of."""
    modes = [text for kind, holds, text in DECLARED_MODES if kind in config.eval.eval and holds(config)]
    return modes if config.data.doc_isolation else ["DOC_ISOLATION=0: tokens attend to earlier documents", *modes]


FINEWEB_BYTES, FINEWEB_FLOOR = 151_080_891, 1.0
OTHER_FLOOR = 0.35


def find_alarms(result: dict[str, Any], vocab_size: int) -> list[str]:
    """What no honest evaluation shows, a line each: worse with more context, better than is plausible, worse than
    knowing nothing, a denominator that is not the challenge's. The floor is the challenge's best known score, rounded
    down, on its own text, and a share of the best compressor's elsewhere."""
    scores, alarms, data = result["scores"], [], result["data"]
    fineweb = data["source"].startswith("fineweb")
    if fineweb and abs(data["val_bytes"] / FINEWEB_BYTES - 1) > 0.001:
        alarms.append(f"val_bytes {data['val_bytes']}: the challenge's validation split has {FINEWEB_BYTES}")
    known = [value for value in result["yardsticks"].values() if value]
    floor = FINEWEB_FLOOR if fineweb else OTHER_FLOOR * min(known, default=0.0)
    for kind, entry in scores.items():
        uniform = math.log2(vocab_size) * entry["tokens"] / entry["bytes"]
        if not floor < entry["val_bpb"] < 1.05 * uniform:
            alarms.append(f"{kind} {entry['val_bpb']:.4f} BPB: not between a plausible {floor:.4f} and the "
                          f"{uniform:.4f} of a model that knows nothing")
    for better in ("sliding", "document"):
        if {better, "contiguous"} <= set(scores) and (
                scores[better]["val_bpb"] > scores["contiguous"]["val_bpb"] + 0.001):
            alarms.append(f"{better} {scores[better]['val_bpb']:.4f} BPB: worse than contiguous "
                          f"{scores['contiguous']['val_bpb']:.4f}, though it has more context")
    return alarms


@functools.cache
def provenance() -> dict[str, str]:
    """Hash and commit of the readable source: from the packed file's first line, or from the file and its checkout."""
    if not BAKED:
        return {"source_sha256": sha256_file(__file__), "commit": git_commit(Path(__file__).parent)}
    with open(__file__, encoding="latin-1") as file:
        line = file.readline()
    source, commit = re.search(r"source sha256 (\w+)", line), re.search(r"commit (\w+)( with local changes)?", line)
    return {"source_sha256": source[1] if source else "unknown",
            "commit": commit[1] + ("+" if commit[2] else "") if commit else "unknown"}


def final_table(result: dict[str, Any], config: Config) -> list[str]:
    """The last lines of a run: scores beside yardsticks, bytes against the cap, seconds against the budgets."""
    rows = [("", "nats/token", "bits/byte", "seconds")]
    for name, entry in result.get("scores", {}).items():
        what = "float weights" if name == "float" else f"artifact, {name}"
        rows.append((what, f"{entry['val_loss']:.4f}", f"{entry['val_bpb']:.4f}", f"{entry['seconds']:.1f}"))
    for name, value in result.get("yardsticks", {}).items():
        rows.append((f"{name} on the same bytes", "", f"{value:.4f}", ""))
    lines = ["", *(f"{a:<28}{b:>12}{c:>12}{d:>10}" for a, b, c, d in rows)]
    artifact, budget = result.get("artifact"), result["budget"]
    if artifact:
        left = artifact["limit_bytes"] - artifact["total_bytes"]
        lines.append(f"bytes: model {artifact['model_bytes']:,} + code {artifact['code_bytes']:,} = "
                     f"{artifact['total_bytes']:,} of {artifact['limit_bytes']:,} "
                     f"({abs(left):,} {'under' if left >= 0 else 'OVER'})")
    lines += [f"ALARM: {text}" for text in result["alarms"]]
    limit = config.train.max_wallclock_seconds
    for what, seconds, most in (
            ("training, with calibration", budget["train_seconds"], limit),
            ("strict training: compilation, warm-up and writing too", budget["strict_train_seconds"], limit),
            ("evaluation", budget["eval_seconds"], config.eval.eval_budget_seconds)):
        verdict = "no limit" if not most else f"of {most:g}: " + ("within budget" if seconds <= most else "OVER BUDGET")
        lines.append(f"seconds: {what} {seconds:.1f} {verdict}")
    return lines


STAGES: dict[str, Callable[[Run], None]] = {
    "train": stage_train, "calibrate": stage_calibrate, "write": stage_write, "reload": stage_reload,
    "evaluate": stage_evaluate, "report": stage_report}


def published_lines(config: Config, count: int) -> list[str]:
    """At full size, how the parameters of a published system and ours add up."""
    preset = PRESETS[config.run.preset]
    if config.run.overlay or not preset.published:
        return []
    lines = [f"  {number:>+12,}  {why}" for number, why in preset.mended]
    found = count + sum(number for number, _ in preset.mended)
    return [*lines, f"{'published':<12}{preset.published:>14,}" + (
        "" if found == preset.published else f"  differs by {found - preset.published:+,}: other settings")]


USUAL_SIGMAS = 12.85  # where the challenge's int6 grids ended in the spring of 2026


def sigma_lines(config: Config, model: GPT, code_bytes: int) -> list[str]:
    """Where grids end at a quantile and steps are not fitted, what the file would be with grids that end at
    USUAL_SIGMAS deviations instead."""
    settings = config.artifact
    if settings.fit or settings.matrix_clip_sigmas or not any(can_stretch(route) and not route.sigmas for route in
                                                              routes_of(model, settings).values()):
        return []
    other = dataclasses.replace(settings, matrix_clip_sigmas=USUAL_SIGMAS, embed_clip_sigmas=USUAL_SIGMAS)
    total = sum(forecast_fitted(model, other, code_bytes).values()) + code_bytes
    return [f"{'':<12}{'':>14}{'':>8}{round(total):>16,}  with MATRIX_CLIP_SIGMAS and EMBED_CLIP_SIGMAS {USUAL_SIGMAS}"]


def plan_report(config: Config, code_bytes: int) -> str:
    """--plan: layer plan, parameters by role, predicted bytes, training FLOPs. No data, no GPU, no weights."""
    model = make_skeleton(config)
    roles, forecast = count_roles(model), forecast_fitted(model, config.artifact, code_bytes)
    formats: dict[str, set[str]] = {}
    for name, parameter in model.named_parameters():
        formats.setdefault(parameter.role, set()).add(pick_route(name, parameter.role, config.artifact).format)
    total = sum(forecast.values()) + code_bytes
    lines = [f"preset {config.run.preset}, overlay {config.run.overlay or 'none'}", plan_text(config.model), "",
             f"{'role':<12}{'parameters':>14}{'format':>8}{'forecast bytes':>16}"]
    for role, count in roles.items():
        lines.append(f"{role:<12}{count:>14,}{'+'.join(sorted(formats[role])):>8}{round(forecast[role]):>16,}")
    lines += [f"{'container':<12}{'':>14}{'':>8}{round(forecast['container']):>16,}",
              f"{'code':<12}{'':>14}{'':>8}{code_bytes:>16,}",
              f"{'total':<12}{sum(roles.values()):>14,}{'':>8}{round(total):>16,}  "
              f"of {config.artifact.target_bytes:,}", *sigma_lines(config, model, code_bytes),
              *published_lines(config, sum(roles.values())), ""]
    for phase in plan_layers(config.model):
        flops = 3 * forward_flops(config.model, config.data.vocab_size, phase, config.train.train_seq_len)
        step = flops * config.train.train_batch_tokens
        lines.append(f"from {phase.start:.0%}: {flops / 1e6:,.1f} MFLOPs a token trained, "
                     f"{step / 1e12:,.2f} TFLOPs a step, "
                     f"{step * config.train.iterations / 1e15:,.1f} PFLOPs in {config.train.iterations} steps")
    return "\n".join(lines)


def run_packed(config: Config, words: list[str], env: Mapping[str, str]) -> None:
    """Replace this process by the packed file, in its place under torchrun. The file's name is its content's hash, so
    every rank may write it. CPU threads that wait do so asleep: spinning takes the core from the one they wait for
    wherever something else runs (records/LOG.md)."""
    data = pack_self(config)
    path = Path(config.run.runs_path) / "packed" / hashlib.sha256(data).hexdigest()[:16] / "train_gpt.py"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, data)
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, str(path), *words], {"OMP_WAIT_POLICY": "PASSIVE", **env})


def run_stages(config: Config, env: Mapping[str, str]) -> None:
    """Walk the stages of one launch on this rank."""
    world = make_world(env)
    compiled, reason = pick_compile(config.system.compile, world.device)
    micros = config.train.train_batch_tokens // config.train.micro_batch_tokens
    world, threads = share_threads(world, config.system.threads, int(env.get("LOCAL_WORLD_SIZE", world.size)),
                                   1 if compiled else micros // world.size)
    run = Run(config, world, threads, compiled)
    try:
        line = run.log.line
        line(f"run_id:{run.folder.name} preset:{config.run.preset} overlay:{config.run.overlay or 'none'} "
             f"seed:{config.run.seed} config:{config.digest()[:16]} commit:{provenance()['commit']} "
             f"packed:{int(bool(BAKED))}")
        line("settings that differ from their defaults:\n" + differences_text(config))
        line(plan_text(config.model))
        line(f"world_size:{world.size} device:{world.device} threads:{threads} in {world.lanes} lanes "
             f"dtype:{str(run.dtype)[6:]} torch:{torch.__version__}")
        line(f"compile:{int(compiled)} ({reason})")
        for text in run.kernel_lines:
            line(text)
        if world.first and run.other_code:
            line("declared: this script differs from the train_gpt.py that the run folder began with")
        for mode in declared_modes(config):
            line(f"declared mode: {mode}")
        same = world.gather((config.digest(), sha256_file(__file__), run.data().manifest_sha256))
        if odd := [rank for rank, facts in enumerate(same) if facts != same[0]]:
            raise ConfigError(f"WORLD_SIZE={world.size}: rank {odd[0]} has other settings, another script or other "
                              "data than rank 0")
        check_sign_key(run)
        run.log.event("began", seed=config.run.seed, config_hash=config.digest(), code_sha256=sha256_file(__file__),
                      manifest_sha256=run.data().manifest_sha256, **provenance())
        for stage in config.run.stages:
            STAGES[stage](run)
            world.barrier()
        if run.unsealed:
            seal(run)
    finally:
        run.log.close()
    # Not after a failure: taking a group apart waits for peers that may be waiting for this rank.
    if world.size > 1:
        dist.destroy_process_group()


def user_line(error: OSError, where: str) -> str:
    """One line for a disk that is full or a folder that cannot be written."""
    return f"RUNS_PATH: {error.filename or where}: {error.strerror or error}; free space or choose another RUNS_PATH"


USER_ERRNOS = {errno.ENOSPC, errno.EACCES, errno.EPERM, errno.EROFS, errno.EDQUOT, errno.ENOTDIR, errno.EFBIG}


OTHER_RANKS_WAIT_SECONDS = 3.0


def micro_tokens(config: Config | None) -> str:
    """MICRO_BATCH_TOKENS for an error line, also where the configuration was not yet resolved."""
    return str(config.train.micro_batch_tokens) if config else "?"


def show(text: str) -> None:
    """Print to standard output; a reader that has seen enough (`| head`) is no fault."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main(argv: list[str], env: Mapping[str, str]) -> int:
    """The command line; returns the exit code."""
    rank, size = env.get("RANK", "0"), int(env.get("WORLD_SIZE", "1"))

    def refuse(error: object, code: int) -> int:
        if rank != "0":
            # What fails on all ranks is printed by rank 0, and the launcher ends the others within this time.
            time.sleep(OTHER_RANKS_WAIT_SECONDS)
        print(error if rank == "0" else f"rank {rank}: {error}", file=sys.stderr, flush=True)
        if size > 1:
            # At once, without taking the process group apart: the launcher then ends the ranks that wait for this one.
            sys.stdout.flush()
            os._exit(code)
        return code

    words = [word for word in argv if not word.startswith("-")]
    flags = [word for word in argv if word.startswith("-")]
    if any(flag not in ("--help", "--presets", "--plan") for flag in flags):
        return refuse(f"{flags[0]}: unknown; --help, --presets and --plan are known, all else is NAME=value", 2)
    if "--help" in flags or "--presets" in flags:
        show(help_text() if "--help" in flags else presets_text())
        return 0
    config = None
    try:
        config = load_config(words, env)
        check_rows(config)
        check_squeeze(config)
        if config.eval.audit:
            load_tool(config.run.tools_path, "audit", "AUDIT")
        if "--plan" in flags:
            code = Path(__file__).stat().st_size if BAKED else len(pack_self(config))
            show(plan_report(config, code))
            return 0
        if config.run.pack and not BAKED:
            run_packed(config, words, env)
        run_stages(config, env)
        return 0
    except ConfigError as error:
        return refuse(error, 2)
    except CheckError as error:
        return refuse(error, 3)
    except KeyboardInterrupt:
        return refuse("interrupted: the same RUN_ID resumes from the last checkpoint", 130)
    except torch.OutOfMemoryError as error:
        return refuse(f"MICRO_BATCH_TOKENS={micro_tokens(config)}: the device ran out of memory "
                      f"({str(error).splitlines()[0]}); lower MICRO_BATCH_TOKENS, EVAL_BATCH_TOKENS or MODEL_DIM", 2)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "can't allocate memory" not in str(error):
            if rank != "0":
                # Most likely a peer is gone, and the launcher ends this rank within this time.
                time.sleep(OTHER_RANKS_WAIT_SECONDS)
            raise
        return refuse(f"MICRO_BATCH_TOKENS={micro_tokens(config)}: the machine ran out of memory; lower "
                      "MICRO_BATCH_TOKENS, EVAL_BATCH_TOKENS or MODEL_DIM", 2)
    except OSError as error:
        if error.errno not in USER_ERRNOS:
            raise
        return refuse(user_line(error, config.run.runs_path if config else ""), 2)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.environ))
