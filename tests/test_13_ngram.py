"""n-grams: exact counts against a dictionary, distributions that sum to one, weights that know only the past, gates."""

from collections import Counter, defaultdict
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import make_model, small_config, small_words
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt
from train_gpt import GATES, Facts, NgramMixture, NgramSettings, NgramStore, chain_chances, mix_grams, orders_of

ORDERS = [(2, 3, 4, 5, 6), (2,), (4,), (3, 5), (16,), (8, 10, 12, 14, 16)]
VOCAB, D = 7, 0.5


def settings_of(gate="learned", **values):
    return NgramSettings(ngram_gate=gate, **{"token_order": (3,), "token_threshold": (0.5,), "token_min_count": (1,),
                                             **values})


def cut(tokens, sizes):
    """The tokens in pieces of these sizes, again and again."""
    start, pieces = 0, []
    while start < len(tokens):
        size = sizes[len(pieces) % len(sizes)]
        pieces.append(tokens[start:start + size])
        start += size
    return pieces


def filled(tokens, orders, vocab=VOCAB, sizes=(1 << 30,)):
    store = NgramStore(orders, vocab)
    for piece in cut(np.asarray(tokens, np.int64), sizes):
        store.absorb(piece)
    return store


def count_grams(tokens, order):
    """context -> counts of what followed it, by the book."""
    followed = defaultdict(Counter)
    for end in range(order - 1, len(tokens)):
        followed[tuple(tokens[end - order + 1:end])][int(tokens[end])] += 1
    return followed


def book_chances(tokens, context, orders, vocab, discount):
    """The distributions (E, V) behind `context` by the definition, one token at a time."""
    chance = (np.bincount(tokens, minlength=vocab) + 1) / (len(tokens) + vocab)
    rows = []
    for order in orders:
        key = tuple(context[-(order - 1):]) if len(context) >= order - 1 else None
        followed = count_grams(tokens, order).get(key, {})
        if total := sum(followed.values()):
            chance = np.array([(max(followed.get(v, 0) - discount, 0) + discount * len(followed) * chance[v]) / total
                               for v in range(vocab)])
        rows.append(chance)
    return np.array(rows)


def random_model(count, vocab, seed=0, scale=2.0):
    return torch.randn(count, vocab, generator=torch.Generator().manual_seed(seed)).mul(scale).log_softmax(-1)


def repetitive(count, vocab, seed=0):
    """Random tokens in which stretches come back, so that all orders match."""
    rng, parts = np.random.default_rng(seed), []
    while sum(map(len, parts)) < count:
        fresh = rng.integers(0, vocab, int(rng.integers(1, 30)))
        parts.append(parts[int(rng.integers(len(parts)))] if parts and rng.random() < 0.6 else fresh)
    return np.concatenate(parts)[:count].astype(np.int64)


streams = st.lists(st.integers(0, 2), min_size=1, max_size=80).map(lambda tokens: np.array(tokens, np.int64))
pieces = st.lists(st.integers(1, 9), min_size=1, max_size=3)


@pytest.mark.parametrize("orders", ORDERS)
@pytest.mark.parametrize("shape", [(4, 65536), (1, 3)])
@settings(max_examples=25, deadline=None)
@given(streams, streams, pieces)
def test_counts_are_those_of_a_dictionary(orders, shape, past, ahead, sizes):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_gpt, "LEVEL_RATIO", shape[0])
        patch.setattr(train_gpt, "ABSORB_TOKENS", shape[1])
        store = filled(past, orders, sizes=sizes)
    inputs = np.concatenate([past, ahead])
    matches = store.look(inputs, len(ahead))
    for order, match in zip(orders, matches, strict=True):
        book = count_grams(past, order)
        assert (np.diff(match.pairs) > 0).all() and match.start[-1] == len(match.pairs)
        for position, row in enumerate(match.which):
            end = len(past) + position + 1
            followed = book.get(tuple(inputs[end - order + 1:end]), {}) if end >= order - 1 else {}
            span = slice(match.start[row], match.start[row + 1])
            assert dict(zip(match.pairs[span] & 0xFFFF, match.count[span], strict=True)) == followed
            assert (match.pairs[span] >> 16 == row).all()
            assert (match.total[row], match.kinds[row]) == (sum(followed.values()), len(followed))
            if followed:
                best = max(followed.values())
                assert match.best[row] == best
                assert match.hint[row] == min(token for token in followed if followed[token] == best)
    assert (store.unigrams == np.bincount(past, minlength=VOCAB)).all()


@pytest.mark.parametrize("orders", ORDERS)
def test_the_size_of_the_calls_does_not_matter(orders):
    tokens = repetitive(3000, 5)
    whole, want = filled(tokens, orders), None
    for sizes in ((1,), (7, 1, 300), (1 << 30,)):
        got = filled(tokens, orders, sizes=sizes).look(tokens[-400:], 300)
        want = want or whole.look(tokens[-400:], 300)
        for one, other in zip(got, want, strict=True):
            for name in ("total", "kinds", "best", "hint"):
                assert (getattr(one, name)[one.which] == getattr(other, name)[other.which]).all()


def test_a_gram_across_two_calls_counts():
    store = filled([1, 2, 3], (3,), sizes=(2,))
    assert store.look(np.array([1, 2]), 1)[0].total[0] == 1


def test_contexts_need_not_lie_in_the_past():
    """Only n-grams are looked up in the past; the context itself comes from the inputs."""
    store = filled([1, 2, 3, 1, 2, 4], (3,))
    match = store.look(np.array([5, 1, 2, 6]), 3)[0]
    assert match.total[match.which].tolist() == [0, 2, 0]


def test_ids_up_to_the_last():
    tokens = np.array([65535, 0, 65535, 65535, 65535, 0, 65534, 65535, 0])
    store = filled(tokens, (2, 3), 65536)
    for order, match in zip((2, 3), store.look(tokens, len(tokens)), strict=True):
        book = count_grams(tokens, order)
        for position, row in enumerate(match.which):
            followed = book.get(tuple(tokens[max(0, position - order + 2):position + 1]), {})
            span = slice(match.start[row], match.start[row + 1])
            assert dict(zip(match.pairs[span] & 0xFFFF, match.count[span], strict=True)) == followed


def test_nothing_collides():
    """200,000 different contexts, each with one continuation: nobody gets another one's counts."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 65536, 200_000)
    store = filled(tokens, (3,), 65536, (50_000,))
    strange = rng.integers(0, 65536, 200_000)
    seen = set(zip(tokens[:-2].tolist(), tokens[1:-1].tolist(), strict=True))
    match = store.look(strange, len(strange))[0]
    known = [False] + [pair in seen for pair in zip(strange[:-1].tolist(), strange[1:].tolist(), strict=True)]
    assert ((match.total[match.which] > 0) == known).all() and sum(known) < 50
    match = store.look(tokens[:-1], len(tokens) - 1)[0]
    assert match.total[match.which][1:].mean() < 1.01 and (match.total[match.which][1:] > 0).all()


def test_levels_fall_in_size_and_share_no_pair():
    store = filled(repetitive(20_000, 50), (2, 4, 16), 50, (64,))
    for grams in store.grams.values():
        sizes = [len(level[0]) for level in grams.levels]
        assert all(a >= train_gpt.LEVEL_RATIO * b for a, b in zip(sizes, sizes[1:], strict=False)) and len(sizes) < 7
        pairs = np.concatenate([level[0] for level in grams.levels])
        numbers = np.concatenate([level[1] for level in grams.levels])
        assert len(np.unique(pairs)) == len(pairs) == grams.size
        assert (np.sort(numbers) == np.arange(grams.size)).all()
        assert all((np.diff(level[0].astype(np.int64)) > 0).all() for level in grams.levels)


@pytest.mark.parametrize("orders", ORDERS)
@pytest.mark.parametrize("discount", [0.0, 0.5, 0.9])
def test_distributions_are_those_of_the_definition(orders, discount):
    rng = np.random.default_rng(len(orders))
    past, ahead = repetitive(150, VOCAB, 1), repetitive(190, VOCAB, 1)[150:]
    store, inputs = filled(past, orders), np.concatenate([past, ahead])
    matches = store.look(inputs, len(ahead))
    base = (store.unigrams + 1) / (store.unigrams + 1).sum()
    model = random_model(len(ahead), VOCAB)
    weights = rng.dirichlet(np.ones(len(orders) + 1), len(ahead))
    mixed = mix_grams(model.exp(), weights, matches, base, discount).exp().double().numpy()
    for position in range(len(ahead)):
        rows = book_chances(past, inputs[:len(past) + position + 1], orders, VOCAB, discount)
        assert np.allclose(rows.sum(1), 1, atol=1e-12)
        want = weights[position] @ np.concatenate([model[position].double().exp().numpy()[None], rows])
        assert np.allclose(mixed[position], want, atol=1e-6)
        for token in range(VOCAB):
            tokens = np.full(len(ahead), token)
            chances = chain_chances(matches, tokens, base[tokens], discount)[position]
            assert np.allclose(chances, rows[:, token], atol=1e-12)


def drive(gate, tokens, vocab, block, model, keep=(), **values):
    """A whole evaluation: log-distributions (n - 1, V), notes of the blocks, the mixture. `keep` cuts the blocks into
    pieces at these offsets."""
    config = settings_of(gate, **values)
    mixture, out, told = NgramMixture(config, vocab, tokens[:1]), [], []
    head = np.random.default_rng(1).normal(size=(len(tokens), len(orders_of(config)) + 1)) if gate == "head" else None
    for start in range(1, len(tokens), block):
        stop = min(start + block, len(tokens))
        edges = sorted({start, stop, *(start + offset for offset in keep if start + offset < stop)})
        notes = []
        for low, high in zip(edges, edges[1:], strict=False):
            rows = slice(low - 1, high - 1)
            mixed, note = mixture.predict(tokens[max(0, low - 20):high - 1], model[rows],
                                          None if head is None else head[rows])
            note[:, 0] = model[rows].gather(1, torch.from_numpy(tokens[low:high])[:, None])[:, 0].numpy()
            out.append(mixed)
            notes.append(note)
        told.append((tokens[start:stop], np.concatenate(notes)))
        mixture.absorb_block(*told[-1])
    return torch.cat(out), told, mixture


def flat(state):
    return [] if state is None else [state] if isinstance(state, np.ndarray) else list(state)


@pytest.mark.parametrize("gate", GATES)
def test_every_gate_sums_to_one_and_says_what_its_weights_say(gate):
    tokens, vocab = repetitive(1201, 2048), 2048
    model = random_model(1200, vocab)
    out, told, mixture = drive(gate, tokens, vocab, 150, model)
    assert out.dtype == torch.float32 and out.shape == (1200, vocab)
    assert (out.double().exp().sum(-1) - 1).abs().max() < 1e-6
    assert torch.isfinite(out).all() and not torch.equal(out, model)
    # The score's way and the update's way to the same probability agree.
    checker = NgramMixture(mixture.settings, vocab, tokens[:1])
    place, seen = 0, []
    update = checker.gate.update
    checker.gate = checker.gate._replace(update=lambda *given: seen.append(given) or update(*given))
    for block, notes in told:
        matches, counts = checker._look(np.concatenate([checker.store.tail, block[:-1]]), len(block))
        weights = checker.gate.weights(checker.state, checker._facts(counts, notes), checker.settings)
        assert weights.shape == (len(block), 1 + len(orders_of(checker.settings)))
        assert (weights >= 0).all() and np.allclose(weights.sum(1), 1, atol=1e-12)
        chances = chain_chances(matches, block, checker._base()[block], checker.discount)
        chances = np.concatenate([np.exp(notes[:, :1].astype(float)), chances], 1)
        want = np.log((weights * chances).sum(1))
        got = out[place:place + len(block)].gather(1, torch.from_numpy(block)[:, None])[:, 0].double().numpy()
        assert np.allclose(got, want, atol=2e-6)
        place += len(block)
        checker.absorb_block(block, notes)
        assert np.array_equal(seen[-1][2], chances)  # the gate learns from what the counts said before the block
        assert np.array_equal(seen[-1][1].total, np.stack([match.total[match.which] for match in matches], 1))
    # The state is a function of what was told.
    for one, other in zip(flat(checker.state), flat(mixture.state), strict=True):
        assert np.array_equal(one, other)
    for one, other in zip(checker.store.grams.values(), mixture.store.grams.values(), strict=True):
        assert all(np.array_equal(a, b) for x, y in zip(one.levels, other.levels, strict=True)
                   for a, b in zip(x, y, strict=True))


def test_a_model_that_sums_to_one_only_almost_is_scaled():
    model = random_model(100, 2048) + 2e-5
    mixture = NgramMixture(settings_of(), 2048, repetitive(500, 2048))
    assert (mixture.predict(repetitive(100, 2048), model)[0].double().exp().sum(-1) - 1).abs().max() < 1e-6


@pytest.mark.parametrize("gate", GATES)
def test_pieces_of_a_block_are_predicted_as_the_whole_block(gate):
    tokens = repetitive(700, 30)
    model = random_model(699, 30)
    whole, _, one = drive(gate, tokens, 30, 100, model)
    parts, _, other = drive(gate, tokens, 30, 100, model, keep=(1, 2, 40, 77))
    assert torch.allclose(whole, parts, atol=1e-6)
    for left, right in zip(flat(one.state), flat(other.state), strict=True):
        assert np.allclose(left, right)


@pytest.mark.parametrize("gate", GATES)
def test_a_row_knows_nothing_of_its_target_and_of_later_tokens(gate):
    tokens, at = repetitive(600, 30), 437  # target 437 stands in the fifth block of 100
    model = random_model(599, 30)
    out, _, _ = drive(gate, tokens, 30, 100, model)
    other = tokens.copy()
    other[at:] = (other[at:] + 1 + np.arange(len(tokens) - at) % 28) % 30
    changed_model = model.clone()
    changed_model[at:] = random_model(599 - at, 30, 5)  # what the model says once it saw the change
    changed, _, _ = drive(gate, other, 30, 100, changed_model)
    assert torch.equal(out[:at], changed[:at])
    assert not torch.equal(out[at:at + 5], changed[at:at + 5])


@pytest.mark.parametrize("gate", GATES)
def test_a_prediction_changes_nothing(gate):
    tokens = repetitive(400, 30)
    _, _, mixture = drive(gate, tokens, 30, 100, random_model(399, 30))
    model = random_model(50, 30)
    head = np.zeros((50, 6)) if gate == "head" else None
    before = model.clone()
    first, notes = mixture.predict(tokens[-60:], model, head)
    second, again = mixture.predict(tokens[-60:], model, head)
    assert torch.equal(first, second) and np.array_equal(notes, again) and torch.equal(model, before)


def facts(**values):
    one = {"entropy": 4.0, "total": [6, 2], "kinds": [3, 1], "best": [3, 2]} | values
    return Facts(np.array([one["entropy"]]), *(np.array([one[key]]) for key in ("total", "kinds", "best")),
                 *(np.array([one[key]]) if key in one else None for key in ("hint", "head")))


def weights_of(gate, given, state=None, **values):
    config = settings_of(gate, ngram_eval_order=3, **values)
    state = GATES[gate].start(config) if state is None else state
    return GATES[gate].weights(state, given, config)[0]


def test_entropy_gate_by_hand():
    # order 3 matches twice: its centre is 4 - 0.25, so alpha is 0.05 + 0.55 / (1 + exp(-2 * 0.25))
    assert np.allclose(weights_of("entropy", facts()), [1 - 0.392356, 0, 0.392356], atol=1e-6)
    assert np.allclose(weights_of("entropy", facts(total=[6, 1])), [1 - 0.325, 0.325, 0], atol=1e-6)
    assert np.allclose(weights_of("entropy", facts(total=[1, 0])), [1, 0, 0])
    assert np.allclose(weights_of("multipliers", facts()), [1 - 0.3 * 0.392356, 0, 0.3 * 0.392356], atol=1e-6)
    loud = weights_of("multipliers", facts(entropy=50.0), ngram_order_mults=(1.0, 9.0))
    assert np.allclose(loud, [0.05, 0, 0.95])


def test_cubric_rises_where_the_order_beats_the_model():
    config = settings_of("cubric", ngram_eval_order=3)
    start = GATES["cubric"].start(config)
    assert np.allclose(start[:, 0, 0], [1, 0.45, 0.30])
    entropy = np.repeat([0.0, 4.0, 9.0, 0.0], 10)  # four cells of order 2, ten positions each
    total = np.stack([np.repeat([2, 2, 2, 60], 10), np.zeros(40, int)], 1)
    given = Facts(entropy, total, total, total)
    chances = np.full((40, 3), 0.5)
    chances[:10, 1], chances[10:20, 1], chances[20:, 1] = 0.9, 0.1, np.tile([0.9, 0.1], 10)
    state = GATES["cubric"].update(start, given, chances, config)
    assert np.allclose([state[1, 0, 0], state[1, 1, 0], state[1, 2, 0], state[1, 0, 2]],
                       [0.45 * 1.03, 0.45 * 0.97, 0.45, 0.45])
    few = GATES["cubric"].update(start, Facts(entropy[:39], total[:39], total[:39], total[:39]), chances[:39], config)
    assert np.allclose(few[1, 0, 0], 0.45 * 1.03)
    rare = Facts(*(values[:37] for values in given[:4]))  # the fourth cell has seven hits
    assert np.array_equal(GATES["cubric"].update(start, rare, chances[:37], config), start)
    for _ in range(200):
        state = GATES["cubric"].update(state, given, chances, config)
    assert state[1, 0, 0] == 2 and state[1, 1, 0] == 0.3
    assert np.allclose(weights_of("cubric", facts(entropy=0.0, total=[2, 0]), state)[1], 2 * 0.05, atol=1e-3)


def test_head_gate_by_hand():
    given = facts(total=[6, 0], head=[2.0, 1.0, 50.0])
    share = 1 / (1 + np.exp(-1))
    assert np.allclose(weights_of("head", given), [0.05 + 0.95 * share, 0.95 * (1 - share), 0])


def test_the_tilt_is_the_published_formula():
    config = settings_of("tilt", token_order=(2, 3), token_threshold=(0.6, 0.6), token_min_count=(2, 1),
                         token_boost=2.0, token_boost_by_share=True)
    #        2 -> 3 twice, 4 once (share 2/3); 1 2 -> 3 and 4 (share 1/2: no hint); 5 2 -> 3 (share 1, hint)
    stream = np.array([1, 2, 3, 0, 1, 2, 4, 0, 5, 2, 3, 9, 9, 7, 8, 1])
    mixture = NgramMixture(config, 10, stream)
    model = random_model(1, 10)
    exact = replace(config, token_threshold=(0.6, 0.5))  # 3 and 4 are equals at the threshold
    got, _ = NgramMixture(exact, 10, stream).predict(np.array([1, 2]), model)
    assert torch.allclose(got[0, 4] - model[0, 4], -torch.log(1 + model[0, 3].exp() * np.expm1(1.0)), atol=1e-6)
    for context, hint, beta in (((5, 2), 3, 2.0), ((1, 2), 3, 2 * 2 / 3), ((6, 6), None, 0), ((6, 7), None, 0)):
        got, _ = mixture.predict(np.array(context), model)
        p = model[0].double().exp()
        factor = torch.ones(10, dtype=torch.double)
        if hint is not None:
            factor[hint] = np.exp(beta)
        want = p * factor / (1 + (p[hint] if hint is not None else 0) * np.expm1(beta))
        assert torch.allclose(got[0].double().exp(), want, atol=1e-6)


def score_both(tokens, model, vocab, block=100):
    out, _, _ = drive("learned", tokens, vocab, block, model)
    targets = torch.from_numpy(tokens[1:])[:, None]
    return -out.gather(1, targets).mean().item(), -model.gather(1, targets).mean().item()


def test_the_learned_gate_helps_on_repeats_and_does_no_harm_under_a_perfect_model():
    tokens = repetitive(6001, 200)
    mixed, alone = score_both(tokens, random_model(6000, 200, scale=1.0), 200)
    assert mixed < 0.8 * alone
    model = random_model(20_000, 50, 3)
    drawn = torch.multinomial(model.exp(), 1, generator=torch.Generator().manual_seed(1))[:, 0]
    mixed, alone = score_both(np.concatenate([[0], drawn.numpy()]), model, 50, 500)
    assert alone < mixed < alone + 0.002


PRIMES = (36313, 27191, 51647, 81929, 131071, 174763, 233017)


def invalid_hashed_chances(past, context, order, vocab, buckets):
    """The published hashed estimate min(full, ctx) / ctx for every candidate token: invalid, kept here as a warning.
    The candidate is in the key of `full`, so strangers share buckets and the sum over candidates is no one."""
    ctx, full = np.zeros(buckets, np.int64), np.zeros(buckets, np.int64)

    def keys(before, targets):
        key = np.zeros(len(before), np.int64)
        for place in range(order - 1):
            key ^= before[:, place] * PRIMES[place % 7]
        return key & buckets - 1, (key ^ targets * PRIMES[(order - 1) % 7]) & buckets - 1

    windows = np.lib.stride_tricks.sliding_window_view(past, order)
    for table, key in zip((ctx, full), keys(windows[:, :-1], windows[:, -1]), strict=True):
        table += np.bincount(key, minlength=buckets)
    begin, end = keys(np.tile(context, (vocab, 1)), np.arange(vocab))
    return np.minimum(full[end], ctx[begin]) / np.maximum(ctx[begin], 1)


def test_the_hashed_variant_is_no_distribution_and_ours_is():
    rng, vocab, order = np.random.default_rng(0), 1024, 4
    past = rng.integers(0, vocab, 60_000)
    sums = [invalid_hashed_chances(past, past[at:at + order - 1], order, vocab, 1 << 13).sum()
            for at in range(0, 300, 30)]
    assert min(sums) > 100  # some hundred times too much probability
    store = filled(past, (2, 3, 4), vocab)
    matches = store.look(past[:303], 300)
    base = (store.unigrams + 1) / (store.unigrams + 1).sum()
    weights = np.tile([0.0, 0.0, 0.0, 1.0], (300, 1))
    ours = mix_grams(random_model(300, vocab).exp(), weights, matches, base, D).double().exp().sum(-1)
    assert (ours - 1).abs().max() < 1e-6


@pytest.mark.parametrize("gate", GATES)
def test_the_evaluator_offers_the_mixture_and_its_state_is_told(gate):
    """Through the referee: what is offered sums to one, and equals the model mixed by hand with what came before."""
    config = small_config(EVAL="ngram", NGRAM_GATE=gate, NGRAM_HEAD=int(gate == "head"), EVAL_SEQ_LEN=32, EVAL_STRIDE=8,
                          NGRAM_CHUNK_TOKENS=20, EVAL_BATCH_TOKENS=64, TOKEN_ORDER=3, TOKEN_THRESHOLD=0.5)
    rng = np.random.default_rng(3)
    tokens = np.concatenate([[1], np.tile(rng.integers(4, 384, 40), 6), rng.integers(4, 384, 60)])
    val = train_gpt.Validation(tokens, np.ones(len(tokens), np.int64), 1, True)
    model, seen = make_model(config, shake=0.1), {}
    world = train_gpt.World()

    def watch(positions, rows):
        seen.update(zip(positions.tolist(), rows.double().numpy(), strict=True))

    found = train_gpt.score("ngram", train_gpt.make_guest("ngram", model, config, world), val, config, world,
                            lambda: 0.0, watch=watch)
    assert max(abs(np.exp(row).sum() - 1) for row in seen.values()) < 1e-6
    plain = train_gpt.score("sliding", train_gpt.make_guest("sliding", model, config, world), val, config, world,
                            lambda: 0.0)
    mixture, forward = NgramMixture(config.ngram, 384, tokens[:1]), train_gpt.make_forward(model, 0)
    for stage in train_gpt.plan_ngram(tokens, config):
        noted, windows = [], [window for job in stage for item in job for window in item.windows]
        for window in windows:
            with torch.no_grad():
                hidden = forward(torch.from_numpy(tokens[window.start:window.stop])[None], None)[0]
                hidden = hidden[window.first - 1 - window.start:]
                logs = model.logits(hidden).log_softmax(-1)
                head = model.mixer_logits(hidden).numpy() if gate == "head" else None
            values, notes = mixture.predict(tokens[window.start:window.stop], logs, head)
            at = np.arange(window.first, window.stop + 1)
            for position, row in zip(at, values.double().numpy(), strict=True):
                assert np.allclose(row, seen[position], atol=2e-5)
            notes[:, 0] = logs.gather(1, torch.from_numpy(tokens[at])[:, None])[:, 0].numpy()
            noted.append(notes)
        mixture.absorb_block(tokens[windows[0].first:windows[-1].stop + 1], np.concatenate(noted))
    assert found.ledger["updates"] == len(train_gpt.plan_ngram(tokens, config)) - 1
    # Text that comes again is what n-grams know.
    assert found.nats < plain.nats - 50 or gate == "head" and found.nats < plain.nats


def test_lessons_weigh_pairs_that_are_known_and_teach_the_head(mini):
    config = train_gpt.load_config(small_words(mini, "x", COMPLEMENT_ALPHA=0.5, NGRAM_HEAD=1), {}, gpus=0)
    data = train_gpt.load_data(config.data, train_gpt.World())
    batches = train_gpt.Batches(data.train, config.data, config.train, 1)
    grams = train_gpt.TrainingGrams(config, batches)
    batch = batches.micro(0, train_gpt.World())
    fresh = grams.lessons(batch).lessons
    assert (fresh.weights == 1).all() and not fresh.seen.any()
    grams.absorb(range(1, 9), train_gpt.World())
    rows = [batches.micro(index, train_gpt.World()) for index in range(1, 9)]
    pairs = Counter(pair for other in rows
                    for pair in zip(other.tokens.flatten().tolist(), other.targets.flatten().tolist(), strict=True))
    firsts = Counter(a for (a, _), count in pairs.items() for _ in range(count))
    wanted = [max(0.1, 1 - 0.5 * pairs[a, b] / (firsts[a] + 1)) for a, b in
              zip(batch.tokens.flatten().tolist(), batch.targets.flatten().tolist(), strict=True)]
    taught = grams.lessons(batch)
    assert torch.allclose(taught.lessons.weights, torch.tensor(wanted), atol=1e-6)
    assert taught.lessons.seen.any() and (taught.lessons.chances > 0).all()
    model = make_model(config, shake=0.1)
    loss = train_gpt.make_loss(model, 0, head_loss=1.0)
    losses = []
    for _ in range(30):
        value = loss(*taught)
        losses.append(value.item())
        slope, = torch.autograd.grad(value, [model.mixer_head])
        with torch.no_grad():
            model.mixer_head -= 0.5 * slope
    assert losses[-1] < losses[0] - 0.05
    # Without lessons the loss is the plain one; with weights of one and no head's part it is the same.
    plain = loss(*batch)
    ones = taught.lessons._replace(weights=torch.ones_like(taught.lessons.weights))
    assert train_gpt.make_loss(model, 0)(*batch._replace(lessons=ones)).item() == pytest.approx(plain.item(), abs=1e-5)


def test_a_taught_run_resumes_with_the_same_counts(mini, tmp_path):
    """Two runs of six steps, one of them in two launches: the same weights, bit for bit."""
    found = []
    for name, stops in (("whole", (6,)), ("halves", (3, 6))):
        for stop in stops:
            words = small_words(mini, tmp_path, RUN_ID=name, ITERATIONS=6, COMPLEMENT_ALPHA=0.5, NGRAM_HEAD=1,
                                STAGES="train", CHECKPOINT_SECONDS=0)
            config = train_gpt.load_config(words, {}, gpus=0)
            data = train_gpt.load_data(config.data, train_gpt.World())
            model = make_model(config)
            folder = tmp_path / name
            folder.mkdir(exist_ok=True)
            log = train_gpt.Log(None, lambda: 0.0)
            trainer = train_gpt.Trainer(config, model, data, train_gpt.World(), log, folder, False,
                                        lambda phase: (0.0, 0.0))
            trainer.resume()
            trainer.warm_up()
            while trainer.step < stop:
                trainer.one_step(trainer.progress())
            trainer.save(finished=stop == 6)
            trainer.writer.shutdown()
        found.append({name: parameter.detach().clone() for name, parameter in model.named_parameters()})
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert not torch.equal(found[0]["mixer_head"][:, 0], torch.zeros(8))
