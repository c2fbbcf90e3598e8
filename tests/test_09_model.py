"""LAYERS and MODEL: causality, document isolation, deltas, plans, roles, initialisation; over every preset."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from conftest import make_model, small_config

from train_gpt import (
    BOS,
    PRESETS,
    ROLES,
    Context,
    Coverage,
    Delta,
    Linear,
    ModelSettings,
    Sites,
    check_roles,
    count_roles,
    document_index,
    exclude_own,
    forecast_fitted,
    forward_flops,
    load_config,
    make_forward,
    make_loss,
    make_skeleton,
    make_spans,
    place_in_document,
    plan_layers,
    plan_phase,
    plan_text,
    random_depth,
    rms_norm,
    rotary_tables,
    round_tokens,
    short_conv,
    span_breaks,
)

LENGTH = 24
STACKS = ["A3", "(A)*5", "A (A2)*2@0.5 A2", "A{mlp=0} A{heads=4,kv=2}", "D2", "G2", "X2", "T2", "K2", "[G X]2 A",
          "D{mlp=0,gate=0} A{xsa=1}"]


def preset_config(preset, **more):
    return small_config(PRESET=preset, DOC_ISOLATION=1, **more)


def case(config, seed=1, batch=2):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(4, config.data.vocab_size, (batch, LENGTH), generator=generator)
    tokens[:, 0] = tokens[:, 9] = BOS
    return make_model(config, seed, shake=0.2), tokens


def phases(model):
    return range(len(model.phases))


# Every part of the model in one of them.
PARTS = {"values": {"VE_LAYERS": "1,2", "VE_DIM": 8, "VALUE_RESIDUAL": 1, "ATTN_GATE": "dense"},
         "grams": {"BIGRAM_VOCAB_SIZE": 31, "BIGRAM_DIM": 8, "TRIGRAM": 1, "ATTN_GATE": "output", "EMBED_DIM": 16},
         "lanes": {"STACK": "A (A2)*2 A", "PARALLEL_START_LAYER": 2, "PARALLEL_FINAL_LANE": "mlp",
                   "ASYM_LOGIT_RESCALE": 1},
         "plain": {"XSA_LAST_N": 0, "ATTN_GATE": "none", "SMEAR_GATE_ENABLED": 0, "LN_SCALE": 0,
                   "PARALLEL_START_LAYER": 0, "SKIP_GATES_ENABLED": 0},
         "full stack": {"STACK": "A3 (A3)*3@0.35 A5", "PARALLEL_START_LAYER": 8, "XSA_LAST_N": 11}}
# Recurrent mixers, and what tells the passes of a group apart.
MIXERS_AND_LOOPS = {"deep memory": {"STACK": "T2", "TITANS_DEPTH": 2, "MIXER_CHUNK": 9},
         "memory as context": {"STACK": "T A T{conv=0}", "TITANS_CONTEXT": 1, "PERSISTENT_SLOTS": 3, "MIXER_CHUNK": 8},
         "free keys": {"STACK": "D G{heads=1}", "EFLA": 1, "EXPAND_K": 0.75, "EXPAND_V": 1.5},
         "negative eigenvalues": {"STACK": "D{gate=0} G", "ALLOW_NEG_EIGVAL": 1, "MIXER_GATE": 1, "MIXER_CHUNK": 5},
         "flow": {"STACK": "A2 (A D{mlp=0})*3 A2", "LOOP_SKIPS": 0, "LOOP_INSTRUCTIONS": "flow", "INST_DIM": 4,
                  "CRAWLER_TAP_DIM": 4, "ANCHOR_DIM": 4, "CRAWLER_LOOP_ROPE_SCALES": "9,1"},
         "static": {"STACK": "A (A)*2@0.5*3@0.7", "LOOP_INSTRUCTIONS": "static", "INST_DIM": 4, "ANCHOR_DIM": 3},
         "gelu and places": {"STACK": "(A)*3 A{mlp=3}", "MLP_ACT": "gelu", "POSITIONS": "learned", "POSITION_ROWS": 256,
                             "POST_NORM": 1, "ROPE_DIMS": -1, "LOGIT_BIAS": 1},
         "held state": {"STACK": "A (A D{mlp=0})*3 A", "LOOP_STATE": "exact"},
         "drawn passes": {"STACK": "A (A2)*1..4~2 A", "LOOP_STATE": "euler", "LOOP_SKIPS": 0, "ANCHOR_DIM": 3},
         "low-rank paths": {"STACK": "A (D)*2 A{mlp=0}", "HGF_RANK": 3},
         "low-rank paths of a knot": {"STACK": "K (K)*2", "HGF_RANK": 3, "ACT_INT8": 1, "KNOT_BITS": 100},
         "what is open": {"STACK": "A G", "GRAMMAR_BIAS": 1},
         "8-bit activations": {"STACK": "A G", "ACT_INT8": 1},
         "radial places": {"STACK": "A D", "POSITIONS": "radial", "EXTRA_NORMS": 1, "SOFTCAP_TYPE": "poly"},
         "position": {"STACK": "(A{xsa=1} X)*2 A{xsa=0} (G)*2", "LOOP_INSTRUCTIONS": "position", "SMEAR_CHANNELS": 1}}
CONFIGS = [*(pytest.param(preset_config(preset), id=preset) for preset in PRESETS),
           *(pytest.param(preset_config("sixteen", STACK=stack), id=stack) for stack in STACKS),
           *(pytest.param(preset_config("caseops", **parts), id=name) for name, parts in PARTS.items()),
           *(pytest.param(preset_config("sixteen", **parts), id=name) for name, parts in MIXERS_AND_LOOPS.items()),
           pytest.param(preset_config("baseline", KERNELS="reference", UNET_SKIPS=0), id="reference kernels")]


@pytest.mark.parametrize("config", CONFIGS)
def test_causality(config):
    """Changing token j moves no hidden state before j, and does move the one at j."""
    model, tokens = case(config)
    for phase in phases(model):
        forward = make_forward(model, phase)
        before = forward(tokens, document_index(tokens))
        for j in (1, 8, 9, 15, LENGTH - 1):
            changed = tokens.clone()
            changed[:, j] = 4 + (tokens[:, j] + 5) % (config.data.vocab_size - 4)
            if j == 9:
                changed[:, j] = 7
            after = forward(changed, document_index(changed))
            assert torch.equal(before[:, :j], after[:, :j])
            assert not torch.equal(before[:, j], after[:, j])


@pytest.mark.parametrize("config", CONFIGS)
def test_document_isolation(config):
    """A document's hidden states do not move when the document before it changes, nor with its place in the row."""
    model, tokens = case(config)
    changed = tokens.clone()
    changed[:, 1:9] = 4 + (tokens[:, 1:9] + 11) % (config.data.vocab_size - 4)
    for phase in phases(model):
        forward = make_forward(model, phase)
        before, after = (forward(x, document_index(x)) for x in (tokens, changed))
        assert torch.equal(before[:, 9:], after[:, 9:])
        assert not torch.equal(before[:, 8], after[:, 8])
        alone = forward(tokens[:, 9:], document_index(tokens[:, 9:]))
        assert torch.allclose(before[:, 9:], alone, atol=2e-4)


def test_without_isolation_documents_do_see_each_other():
    """The isolation test can fail: with the declared published habit it would."""
    model, tokens = case(preset_config("baseline"))
    changed = tokens.clone()
    changed[:, 3] = 9
    forward = make_forward(model, 0)
    assert not torch.equal(forward(tokens, None)[:, 9:], forward(changed, None)[:, 9:])


@pytest.mark.parametrize("config", CONFIGS)
def test_every_parameter_is_trained(config):
    """Each parameter is in the graph of some phase, or of the deepest plan that training draws, and gets a gradient
    that is not zero once branches are open."""
    model, tokens = case(config)
    coverage = Coverage(model)
    moved = set()
    deepest = [plan_phase(config.model, 0.0, deepest=True)] if random_depth(config.model.stack) else []
    for phase in (*phases(model), *deepest):
        model.zero_grad(set_to_none=True)
        make_loss(model, phase)(tokens, tokens.roll(-1, 1), document_index(tokens)).backward()
        coverage.saw_phase()
        moved |= {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    coverage.check_phases()
    assert moved == set(dict(model.named_parameters()))


def test_coverage_names_what_is_never_reached():
    from train_gpt import CheckError
    model, tokens = case(preset_config("baseline"))
    model.lost = torch.nn.Parameter(torch.ones(2))
    coverage = Coverage(model)
    make_loss(model, 0)(tokens, tokens, document_index(tokens)).backward()
    coverage.saw_phase()
    with pytest.raises(CheckError, match="no phase of the plan trains: lost"):
        coverage.check_phases()
    coverage = Coverage(model)
    model.lost.grad = torch.zeros(2)
    for _ in range(Coverage.STEPS - 1):
        coverage.saw_step()
    with pytest.raises(CheckError, match="parameter lost"):
        coverage.saw_step()


@pytest.mark.parametrize("config", CONFIGS)
def test_zero_deltas_change_nothing_and_others_change_every_site(config):
    model, tokens = case(config)
    width = config.model.model_dim
    for phase in phases(model):
        forward = make_forward(model, phase)
        docs = document_index(tokens)
        base = forward(tokens, docs)
        shapes = site_shapes(model, phase, tokens, docs)
        zero = {site: Delta(torch.randn(2, 3, i), torch.zeros(2, o, 3)) for site, (i, o) in shapes.items()}
        assert torch.equal(forward(tokens, docs, zero), base)
        for site, (i, o) in shapes.items():
            one = {site: Delta(torch.randn(2, 3, i), torch.randn(2, o, 3))}
            assert not torch.equal(forward(tokens, docs, one), base), site
        width = config.model.embed_dim or width
        assert not torch.equal(model.logits(base, {"head": Delta(torch.randn(2, 3, width),
                                                               torch.randn(2, config.data.vocab_size, 3))}),
                               model.logits(base))


def site_shapes(model, phase, tokens, docs):
    """Inputs and outputs of every site of a phase, from the modules behind them."""
    width, shapes = model.settings.model_dim, {}
    steps = model.phases[phase].steps
    # Of a loop only what belongs to the passes of this phase, and the whole of what is added before each.
    passes = {(str(step.turn.group), step.turn.number) for step in steps if step.turn and model.loops}
    for name, module in model.named_modules():
        if isinstance(module, Linear) and not name.startswith("blocks.") and name != "head_proj":
            shapes[name] = module.weight.shape[::-1]
            if name.startswith("loops.") and name.rpartition(".")[2].isdigit() and ".tap_in." not in name:
                _, group, kind, number = name.split(".")
                if (group, int(number) + kind.startswith("anchor")) not in passes:
                    del shapes[name]
    for group, number in passes:
        kinds = model.settings
        if kinds.loop_instructions != "none" or kinds.crawler_tap_dim or number:
            shapes[f"loops.{group}.pass.{number}"] = (width, width)
    for step in model.phases[phase].steps:
        block = model.blocks[step.block]
        parts = {name: getattr(block.mixer, name).weight.shape for name in (
            "q", "k", "v", "o", "gate", "code", "field", "knot")
                 if getattr(block.mixer, name, None) is not None} | {"attn": (width, width)}
        if block.mlp is not None:
            parts |= {"up": block.mlp.up.weight.shape, "down": block.mlp.down.weight.shape, "mlp": (width, width)}
        assert set(parts) <= set(Sites._fields)
        shapes |= {f"v{step.visit}.{part}": (shape[1], shape[0]) for part, shape in parts.items()}
    return shapes


def test_low_rank_delta_is_the_same_as_changed_weights():
    """Adding b a to a matrix equals supplying (a, b) at its site; each row of the batch has its own."""
    model, tokens = case(preset_config("sixteen", STACK="A2"))
    docs = document_index(tokens)
    a, b = torch.randn(2, 3, 32) * 0.3, torch.randn(2, 32, 3) * 0.3
    got = make_forward(model, 0)(tokens, docs, {"v1.q": Delta(a, b)})
    for row in range(2):
        weight = model.blocks[1].mixer.q.weight
        saved = weight.detach().clone()
        with torch.no_grad():
            weight += b[row] @ a[row]
        wanted = make_forward(model, 0)(tokens, docs)[row]
        with torch.no_grad():
            weight.copy_(saved)
        assert torch.allclose(got[row], wanted, atol=1e-5)


def test_head_projection_is_a_site():
    model, tokens = case(preset_config("baseline", EMBED_DIM=16))
    hidden = torch.randn(2, 5, 32)
    delta = {"head_proj": Delta(torch.randn(2, 3, 32), torch.randn(2, 16, 3))}
    wanted = F.linear(hidden, model.head_proj.weight) + hidden @ delta["head_proj"].a.mT @ delta["head_proj"].b.mT
    assert torch.allclose(model.head_input(hidden, delta), wanted, atol=1e-5)
    assert model.logits(hidden, delta).shape == (2, 5, 384)


@pytest.mark.parametrize("config", CONFIGS)
def test_a_packed_row_is_its_documents_one_by_one(config):
    """Spans of one long row, cut within documents too, give each part what it has alone; also through the loss."""
    model, tokens = case(config)
    flat = tokens.reshape(1, -1)
    breaks = span_breaks(flat[0].numpy(), 6, True)
    spans = make_spans(breaks, flat.numel(), 6, torch.device("cpu"))
    for phase in phases(model):
        forward = make_forward(model, phase)
        together = forward(flat, spans)
        assert torch.allclose(together, forward(flat, spans.docs(flat.shape)), atol=1e-6)
        changed = flat.clone()
        changed[:, 20] = 5 + flat[:, 20] % 9
        after = forward(changed, spans)
        # Position 20 lies in the second document, behind its first cut at 15; the third begins at 24.
        assert torch.equal(together[:, 24:], after[:, 24:]) and torch.equal(together[:, :20], after[:, :20])
        assert not torch.equal(together[:, 20], after[:, 20])


@pytest.mark.parametrize("config", [row for row in CONFIGS if row.id in (
    "caseops", "values", "grams", "lanes", "flow", "static", "position", "D2", "G2", "X2", "T2", "deep memory",
    "memory as context")])
def test_a_training_step_is_one_graph(config):
    """No graph breaks: torch's tracer takes loss and gradient of the last phase whole, and they are the eager ones."""
    model, tokens = case(config)
    loss, results = make_loss(model, len(model.phases) - 1), []
    torch._dynamo.reset()
    for function in (loss, torch.compile(loss, fullgraph=True, dynamic=False, backend="aot_eager")):
        found = function(tokens, tokens.roll(-1, 1), document_index(tokens))
        results.append([found, *torch.autograd.grad(found, list(model.parameters()), allow_unused=True)])
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*results, strict=True) if a is not None)


def test_exclusive_attention_leaves_nothing_along_the_own_value():
    y, v = torch.randn(2, 5, 6, 4), torch.randn(2, 5, 3, 4)
    out = exclude_own(y, v)
    owner = v.repeat_interleave(2, 2)
    assert (out * owner).sum(-1).abs().max() < 1e-5
    assert torch.allclose(out + (y * owner).sum(-1, keepdim=True) * owner / owner.square().sum(-1, keepdim=True), y,
                          atol=1e-5)
    assert torch.allclose(exclude_own(out, v), out, atol=1e-5)


def test_gates_start_at_their_published_factor():
    """Sparse and dense gates halve at the start (the dense one to 2 %), the output gate passes."""
    for kind, factor, slack in (("sparse", 0.5, 0), ("output", 1.0, 0), ("dense", 0.5, 0.02)):
        gates = make_model(preset_config("baseline", ATTN_GATE=kind)).blocks[0].mixer
        read = torch.randn(3, 32 if kind == "dense" else 12)
        found = gates.plan.gate.factor(F.linear(read, gates.attn_gate), gates.settings)
        assert found.shape == (3, 2) and (found - factor).abs().max() <= slack


def test_lanes_by_hand():
    """One block with lanes: each branch reads its own lane, and both give to both."""
    model = make_model(preset_config("caseops", STACK="A2", PARALLEL_START_LAYER=1, XSA_LAST_N=2), shake=0.2)
    block, x, x0 = model.blocks[1], torch.randn(2, 5, 32), torch.randn(2, 5, 32)
    lane, context, sites = torch.randn(2, 5, 32), Context(None, None, None, None), Sites(*Sites._fields)
    scale = 2 ** -0.5
    mixed = block.resid_mix[0] * x + block.resid_mix[1] * x0
    a = block.attn_scale * block.mixer(rms_norm(mixed, block.eps) * scale, context, sites, None)[0]
    m = block.mlp_scale * block.mlp(rms_norm(lane, block.eps) * scale, sites, None)
    keep, share = block.lane_keep, block.lane_give
    wanted = (keep[0] * x + share[0, 0] * a + share[1, 0] * m, keep[1] * lane + share[0, 1] * a + share[1, 1] * m)
    got = block(x, lane, x0, context, sites, None)
    assert all(torch.allclose(w, g, atol=1e-5) for w, g in zip(wanted, got[:2], strict=True))


def test_what_tells_passes_apart_by_hand():
    """Three passes: flow reads the stream of each, static the one that enters; the tap what stood before, the anchor
    what earlier passes began with."""
    parts = {"STACK": "A (A)*3 A", "INST_DIM": 4, "CRAWLER_TAP_DIM": 3, "ANCHOR_DIM": 5}
    before, entered, later = torch.randn(1, 4, 32), torch.randn(1, 4, 32), torch.randn(1, 4, 32)
    for kind in ("flow", "static", "position", "none"):
        model = make_model(preset_config("baseline", **parts, LOOP_INSTRUCTIONS=kind), shake=0.3)
        loop = model.loops["1"]
        held = loop.enter(entered, [before], None)
        tap = loop.tap_out.weight @ (loop.tap_in[0].weight @ before.mT)
        for number, x in enumerate((entered, later, before)):
            told = tap.mT
            if kind == "position":
                told = told + loop.positions[number]
            elif kind != "none":
                low = loop.inst_in.weight @ (entered if kind == "static" else x).mT
                low = low[:, 4 * number:4 * number + 4] if kind == "static" else low
                told = told + (loop.inst_out[number].weight @ low).mT
            if number:
                written = loop.anchor_in[0].weight @ later.mT
                written = written if number == 1 else written + loop.anchor_in[1].weight @ before.mT
                told = told + (loop.anchor_out[number - 1].weight @ written).mT
            assert torch.allclose(loop(x, number, loop.sites(number), held, None), x + told, atol=1e-5), (kind, number)


def test_rotary_scales_lengthen_the_waves_of_their_pass():
    like = torch.zeros(1)
    settings = ModelSettings(rope_base=100.0)
    for wide, narrow in zip(*(rotary_tables(31, 8, settings, like, by) for by in (3.0, 1.0)), strict=True):
        assert torch.allclose(wide[::3], narrow[:11], atol=1e-5)
    # YaRN leaves the fastest quarter, and slows the slowest by its factor.
    base, slowed = (rotary_tables(9, 16, dataclasses.replace(settings, yarn_factor=by), like)[1] for by in (1.0, 2.0))
    assert torch.equal(base[..., :3], slowed[..., :3])
    place = torch.arange(0, 16, 2) / 16
    wanted = (torch.arange(9)[:, None] * 100.0 ** -place / (1 + ((place - 0.25) / 0.75).clamp(0, 1))).sin()
    assert torch.allclose(slowed[:, 0], wanted, atol=1e-6)
    plain, scaled, first = (make_model(preset_config("baseline", STACK="A (A)*3", **more), shake=0.2) for more in (
        {}, {"CRAWLER_LOOP_ROPE_SCALES": "9,1"}, {"CRAWLER_LOOP_ROPE_SCALES": "1"}))
    tokens = torch.randint(4, 384, (1, LENGTH))
    out = [make_forward(model, 0)(tokens, None) for model in (plain, scaled, first)]
    assert torch.equal(out[0], out[2]) and not torch.allclose(out[0], out[1], atol=1e-3)


def test_channels_blend_with_the_token_before_within_documents():
    blend = make_model(preset_config("baseline", SMEAR_CHANNELS=1)).blend
    e, tokens = torch.randn(1, 4, 32), torch.tensor([[7, 8, BOS, 9]])
    out = blend(e, tokens, None)
    # Sums that nearly cancel differ by the rounding of their parts.
    assert torch.allclose(out[:, [1, 3]], (e[:, [1, 3]] + e[:, [0, 2]]) / 2, atol=1e-6)
    assert torch.allclose(out[:, [0, 2]], e[:, [0, 2]] / 2)


def test_short_convolutions_by_hand():
    x, weight = torch.randn(2, 6, 3), torch.randn(3, 4)
    docs = torch.tensor([[0, 0, 0, 0, 0, 0], [0, 0, 1, 1, 1, 2]])
    out = short_conv(x, weight, docs)
    for b, t in ((0, 5), (0, 1), (1, 2), (1, 4), (1, 5)):
        seen = [s for s in range(max(0, t - 3), t + 1) if docs[b, s] == docs[b, t]]
        assert torch.allclose(out[b, t], sum(weight[:, 3 - (t - s)] * x[b, s] for s in seen), atol=1e-6)
    assert torch.equal(short_conv(x, weight, torch.zeros(2, 6)), short_conv(x, weight, None))
    assert short_conv(x[:, :1], weight, None).shape == (2, 1, 3)  # a row shorter than the window
    assert place_in_document(docs).tolist() == [[0, 1, 2, 3, 4, 5], [0, 1, 0, 1, 2, 0]]


def test_smear_stops_at_the_beginning_of_a_document():
    smear = make_model(preset_config("caseops"), shake=0.5).smear
    e, tokens = torch.randn(1, 6, 32), torch.tensor([[7, 8, BOS, 9, 4, BOS]])
    out = smear(e, tokens, None)
    share = smear.strength * torch.sigmoid(e[..., :12] @ smear.weight.T)
    assert torch.equal(out[:, [0, 2, 5]], e[:, [0, 2, 5]])
    assert torch.allclose(out[:, [1, 3, 4]], (e + share * e.roll(1, 1))[:, [1, 3, 4]], atol=1e-6)


def test_hashed_grams_know_where_a_document_begins():
    """Pairs and triples that span a BOS or the beginning of a row have the last row of the table."""
    grams = make_model(preset_config("baseline", BIGRAM_VOCAB_SIZE=1000, TRIGRAM=1)).bigram
    tokens = torch.tensor([[7, 8, 9, BOS, 9, 4, 6]])
    pairs, triples = grams.index(tokens, 2), grams.index(tokens, 3)
    assert (pairs == 999).tolist() == [[True, False, False, True, False, False, False]]
    assert (triples == 999).tolist() == [[True, True, False, True, True, False, False]]
    assert pairs[0, 1] == ((36313 * 8) ^ (27191 * 7)) % 999
    assert triples[0, 2] == ((36313 * 9) ^ (27191 * 8) ^ (51439 * 7)) % 999


def test_published_parameters_add_up_to_the_digit():
    for name, preset in PRESETS.items():
        if preset.published:
            config = load_config([f"PRESET={name}", "OVERLAY="], {}, gpus=0)
            count = sum(count_roles(make_skeleton(config)).values())
            assert count + sum(number for number, _ in preset.mended) == preset.published, name


GOLDEN_CASEOPS = """\
from 0%: 11 visits: A0 A1 A2 A3 A4 A5<-4 A6<-3 A7<-2 A8=<-1 A9=<-0 A10=
from 35%: 17 visits: A0 A1 A2 A3 A4 A5 A3 A4 A5<-4 A3<-3 A4<-5 A5<-4 A6<-3 A7<-2 A8=<-1 A9=<-0 A10=
blocks 0-10: exclusive attention
blocks 0-10: sparse gate
blocks 0-10: inputs over sqrt(i + 1)"""


def test_golden_plan_of_the_record_stack():
    config = load_config(["PRESET=caseops", "OVERLAY="], {}, gpus=0)
    assert plan_text(config.model) == GOLDEN_CASEOPS
    assert forecast_fitted(make_skeleton(config), config.artifact, 54_000)["matrix"] == pytest.approx(13.6e6, rel=0.01)
    assert "blocks 1,3-5: value embeddings" in plan_text(ModelSettings(ve_layers="1,3,4,5"))


GOLDEN_CLOWNCAR = """\
from 0%: 8 visits: A0 A1 A2 A2 A2 A2 A3<-1 A4<-0
blocks 2: exclusive attention
blocks 0-4: inputs over sqrt(i + 1)
blocks 2, 4 passes: flow instructions"""


def test_golden_plan_of_the_crawler():
    config = load_config(["PRESET=clowncar", "OVERLAY="], {}, gpus=0)
    assert plan_text(config.model) == GOLDEN_CLOWNCAR
    memory = dataclasses.replace(config.model, stack="A2 (A{mlp=4} D{mlp=0,heads=4,gate=0})*4 A2", anchor_dim=32,
                                 crawler_loop_rope_scales=(9.0, 1.0))
    assert plan_text(memory).splitlines()[0] == (
        "from 0%: 12 visits: A0 A1 A2 D3 A2 D3 A2 D3 A2 D3 A4<-1 A5<-0")
    assert plan_text(memory).splitlines()[-1] == (
        "blocks 2-3, 4 passes: flow instructions; anchor of 32; rotary frequencies over 9, 1")
    # The canonical delta memory's published parameters, with our norms, mix and branch gain.
    sizes = [sum(count_roles(make_skeleton(config._replace(model=model))).values()) for model in (
        dataclasses.replace(config.model, stack="A2 (A{mlp=4})*4 A2"),
        dataclasses.replace(config.model, stack="A2 (A{mlp=4} D{mlp=0,heads=4,gate=0})*4 A2"))]
    assert sizes[1] - sizes[0] == 1_056_772 + 2 * 512 + 512 + 128


GOLDEN = {
    "A9": "from 0%: 9 visits: A0 A1 A2 A3 A4<-3 A5<-2 A6<-1 A7<-0 A8",
    "A3 (A3)*3@0.35 A5": "from 0%: 11 visits: A0 A1 A2 A3 A4 A5<-4 A6<-3 A7<-2 A8<-1 A9<-0 A10\n"
                         "from 35%: 17 visits: A0 A1 A2 A3 A4 A5 A3 A4 A5<-4 A3<-3 A4<-5 A5<-4 A6<-3 A7<-2 A8<-1 A9<-0 "
                         "A10",
    "(A6)*2": "from 0%: 12 visits: A0 A1 A2 A3 A4 A5 A0<-5 A1<-4 A2<-3 A3<-2 A4<-1 A5<-0",
    "A": "from 0%: 1 visits: A0",
}


@pytest.mark.parametrize("stack", GOLDEN)
def test_golden_plans(stack):
    assert plan_text(ModelSettings(stack=stack)) == GOLDEN[stack]


def test_skips_are_indexed_by_block_pair():
    model = make_model(small_config(STACK="A3 (A3)*3@0.35 A5", PRESET="sixteen"))
    pairs = {pair for phase in model.phases for pair in phase.skips()}
    assert set(model.skips) == {f"{a}_{b}" for a, b in pairs} and (5, 4) in pairs and (3, 3) in pairs
    assert len(plan_layers(model.settings)) == 2


def test_shared_weights_are_stored_once():
    one, many = (make_model(small_config(STACK=stack, UNET_SKIPS=0)) for stack in ("A", "(A)*31"))
    assert count_roles(one) == count_roles(many)


@pytest.mark.parametrize("preset", PRESETS)
def test_start_is_the_embedding_alone(preset):
    """At the start every branch ends in zeros, so the output is a function of the current token only, and of its place
    where that is told."""
    config = preset_config(preset, UNET_SKIPS=0, POSITIONS="none", SMEAR_CHANNELS=0)
    model = make_model(config)
    tokens = torch.randint(4, config.data.vocab_size, (1, LENGTH))
    hidden = make_forward(model, 0)(tokens, document_index(tokens))
    shuffled = tokens.flip(1)
    assert torch.allclose(make_forward(model, 0)(shuffled, document_index(shuffled)).flip(1), hidden, atol=1e-5)


def test_initialisation_does_not_depend_on_other_parameters():
    small, large = (dict(make_model(small_config(STACK=stack)).named_parameters()) for stack in ("A2", "A3"))
    assert all(torch.equal(small[name], large[name]) for name in small if name.startswith(("blocks", "tok")))
    matrix = small["blocks.0.mixer.q.weight"]
    assert torch.allclose(matrix @ matrix.T, torch.eye(32), atol=1e-5)
    assert not small["blocks.0.mixer.o.weight"].any()


def test_roles_are_complete():
    model = make_model(small_config())
    check_roles(model)
    assert set(count_roles(model)) <= set(ROLES)
    model.stray = torch.nn.Parameter(torch.ones(1))
    from train_gpt import CheckError
    with pytest.raises(CheckError, match="stray"):
        check_roles(model)


def test_flops_against_a_hand_count():
    """One block: 2 operations a weight, attention over half the row for scores and sums, and the head."""
    settings = ModelSettings(stack="A", model_dim=8, num_heads=2, num_kv_heads=1, mlp_mult=2.0)
    weights = 8 * 8 * 2 + 8 * 4 * 2 + 2 * 8 * 16
    wanted = 2 * weights + 2 * 2 * 8 * 10 / 2 + 2 * 11 * 8
    assert forward_flops(settings, 11, plan_layers(settings)[0], 10) == wanted


def test_baselines_norm_is_torchs_default():
    """The challenge's script passes no epsilon; torch then takes fp32's, also for bf16 input."""
    x = torch.full((4, 64), 0.005, dtype=torch.bfloat16)
    wanted = torch.nn.functional.rms_norm(x, (64,))
    assert torch.equal(rms_norm(x, preset_config("baseline").model.norm_eps), wanted)


def test_rounded_tokens_are_255_steps_and_pass_gradients():
    """Every token has its own grid; the error is at most half a step, zeros stay, and the gradient is that of x."""
    x = torch.randn(4, 7, 64) * torch.tensor([1e-3, 1.0, 50.0, 0.0])[:, None, None]
    x.requires_grad_()
    y = round_tokens(x)
    step = x.detach().abs().amax(-1, keepdim=True) / 127
    assert ((y - x).abs() <= step / 2 * 1.001 + 1e-9).all() and not y[3].any()
    codes = (y / step.clamp_min(1e-5 / 127)).detach()[:3]
    assert torch.allclose(codes, codes.round(), atol=1e-2) and codes.abs().max() <= 127.01
    weights = torch.randn(x.shape)
    (y * weights).sum().backward()
    assert torch.equal(x.grad, weights)
