"""Drafts without a model: what they find, that they keep their bounds, and that their chances are honest."""

import itertools
import random
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidemill.core.tree import EMPTY, ROOT, Shape, TokenTree
from workers.speculation.sources.base import Rates, Recent, Source, best_first
from workers.speculation.sources.lookup import GAP, MAX_MATCH, History, Lookup
from workers.speculation.sources.recycling import ACCEPTANCE, SUCCESSORS, Recycling
from workers.speculation.sources.tenants import PerTenant
from workers.speculation.sources.trigram import Trigram

VOCABULARY = 64
SHAPE = Shape(depth=4, width=3, nodes=12)
MAKERS: list[Callable[[], Source]] = [Lookup, Trigram, lambda: Recycling(VOCABULARY)]
every_source = pytest.mark.parametrize("make", MAKERS, ids=["lookup", "trigram", "recycling"])

SHAPES = st.builds(Shape, depth=st.integers(0, 5), width=st.integers(0, 4), nodes=st.integers(0, 16))
TEXTS = st.lists(st.integers(0, 3), max_size=60)  # few different tokens, so that the same ones meet often


def feed(source: Source, request_id: str, tokens: Sequence[int], prompt: int, stride: int = 1) -> None:
    """As a worker would: propose, commit some, learn, observe."""
    for start in range(prompt, len(tokens), stride):
        end = min(start + stride, len(tokens))
        source.propose(request_id, tokens[:start], SHAPE)
        source.learn(request_id, tokens[:end], start)
        if start:
            likeliest = [
                [token, *((token + 1 + rank) % VOCABULARY for rank in range(3))] for token in tokens[start:end]
            ]
            source.observe(np.array(tokens[start - 1 : end - 1]), np.array(likeliest))


def check(tree: TokenTree, shape: Shape) -> None:
    assert len(tree) <= max(shape.nodes, 0)
    assert max(tree.depths(), default=0) <= shape.depth
    assert len(tree.chances) == len(tree)
    path_chances = tree.path_chances()
    for parent in set(tree.parents):
        children = [node for node in range(len(tree)) if tree.parents[node] == parent]
        assert len(children) <= shape.width
        assert all(0.0 <= tree.chances[node] <= 1.0 for node in children)
        assert sum(tree.chances[node] for node in children) <= 1.0 + 1e-9
        assert all(path_chances[node] <= (1.0 if parent == ROOT else path_chances[parent]) for node in children)


# --- all of them ---------------------------------------------------------------------------------------------------


@every_source
@given(texts=st.lists(TEXTS, max_size=3), shape=SHAPES, stride=st.integers(1, 5))
def test_drafts_are_trees_within_their_shape(
    make: Callable[[], Source], texts: list[list[int]], shape: Shape, stride: int
) -> None:
    source, again = make(), make()
    for number, text in enumerate(texts):
        for each in (source, again):
            feed(each, str(number), text, len(text) // 2, stride)
        tree = source.propose(str(number), text, shape)
        check(tree, shape)
        assert again.propose(str(number), text, shape) == tree
        for each in (source, again):
            each.forget(str(number))


@every_source
def test_little_or_nothing_is_enough_to_ask(make: Callable[[], Source]) -> None:
    source = make()
    for tokens in ([], [1], [1, 2]):
        assert source.propose("a", tokens, SHAPE) == EMPTY
        source.learn("a", tokens, 0)
    source.forget("a")
    source.forget("never heard of")


@every_source
def test_a_text_that_repeats_is_foreseen(make: Callable[[], Source]) -> None:
    source = make()
    text = [1, 2, 3, 4, 5, 6, 7] * 6
    feed(source, "a", text, 10)
    tree = source.propose("a", text, Shape(depth=4, width=2, nodes=8))
    assert tree.find([1, 2, 3, 4]) is not None


@every_source
def test_chances_are_honest(make: Callable[[], Source]) -> None:
    """On a text where a token's successor is one of three, first tokens come about as often as they were said to."""
    rng = random.Random(5)
    source, text = make(), [0]
    said = came = 0.0
    for step in range(4000):
        choice = rng.choices((0, 1, 2), (0.6, 0.3, 0.1))[0]
        text.append((text[-1] * 3 + 1 + choice) % 16)
        if step >= 1000:
            tree = source.propose("a", text[:-1], SHAPE)
            first = [node for node, parent in enumerate(tree.parents) if parent == ROOT]
            said += sum(tree.chances[node] for node in first)
            came += tree.child(ROOT, text[-1]) is not None
        else:
            source.propose("a", text[:-1], SHAPE)
        source.learn("a", text, len(text) - 1)
        likeliest = [[(text[-2] * 3 + 1 + rank) % 16 for rank in range(3)]]
        source.observe(np.array(text[-2:-1]), np.array(likeliest))
    assert came > 500
    assert said == pytest.approx(came, rel=0.15)


# --- lookup --------------------------------------------------------------------------------------------------------


def longest_match(text: Sequence[int], context: Sequence[int]) -> int:
    """Slow and plain: of what ends before the text's end, the most tokens equal to the end of the context."""
    best = 0
    for end in range(1, len(text)):
        if text[end] == GAP:
            continue
        length = 0
        while length < min(end, len(context), MAX_MATCH) and text[end - 1 - length] == context[-1 - length]:
            length += 1
        best = max(best, length)
    return best if best >= 2 else 0


@given(text=TEXTS, context=TEXTS, pieces=st.integers(1, 9))
def test_the_longest_match_is_found(text: list[int], context: list[int], pieces: int) -> None:
    history = History(1000)
    for start in range(0, len(text), pieces):
        history.extend(text[start : start + pieces])
    match = history.find(context, 3)
    assert match.length == longest_match(text, context)
    end = context[len(context) - match.length :]
    for continuation in match.continuations:
        met = [*end, *continuation]
        assert any(text[at : at + len(met)] == met for at in range(len(text)))


def test_continuations_end_where_another_text_begins() -> None:
    history = History(100)
    history.extend([1, 2, 3, GAP, 1, 2, GAP, 4])
    assert history.find([1, 2], 8).continuations == [[3]]
    assert history.find([2, 3], 8).length == 0


@given(text=st.lists(st.integers(0, 9), max_size=300), pieces=st.integers(1, 100))
def test_a_history_keeps_the_newest(text: list[int], pieces: int) -> None:
    history = History(40)
    for start in range(0, len(text), pieces):
        history.extend(text[start : start + pieces])
    assert history.total == len(text)
    assert history.tail(40) == text[-40:]
    assert history.tail(1000) == text[len(text) - len(history.tail(1000)) :]
    assert history.memory_bytes <= 4 * (2 * 40 + MAX_MATCH)


def test_the_commoner_continuation_comes_first() -> None:
    source = Lookup()
    source.learn("a", [1, 2, 3, 9, 1, 2, 4, 9, 1, 2, 3, 8, 1, 2], 13)
    tree = source.propose("a", [1, 2, 3, 9, 1, 2, 4, 9, 1, 2, 3, 8, 1, 2], Shape(1, 4, 9))
    assert tree.tokens == (3, 4)
    assert tree.chances[0] == pytest.approx(2 * tree.chances[1])


def test_longer_matches_draft_more() -> None:
    text = list(range(40))
    source = Lookup(factor=1.5, offset=1.0)
    source.learn("a", text, 0)
    sizes = [len(source.propose("b", [99, 98], Shape(30, 2, 30)))]
    source.forget("a")
    for length in (2, 4, 6):
        sizes.append(len(source.propose("b", [99, *text[:length]], Shape(30, 2, 30))))
    assert sizes == [0, 4, 7, 10]


def test_outputs_serve_others_once_they_are_over() -> None:
    source = Lookup()
    prompt, output = list(range(20)), [31, 32, 33, 34, 35]
    source.learn("a", prompt + output, len(prompt))
    assert source.propose("b", [31, 32], SHAPE) == EMPTY
    source.forget("a")
    assert source.propose("b", [31, 32], SHAPE).tokens == (33, 34, 35)
    assert source.propose("b", [18, 19], SHAPE).tokens[:1] == (31,)  # how the output began
    assert source.propose("b", [3, 4], SHAPE) == EMPTY  # the rest of the prompt is the request's own


def test_outputs_do_not_run_into_each_other() -> None:
    source = Lookup()
    for request_id, output in (("a", [31, 32, 33]), ("b", [41, 42, 43])):
        source.learn(request_id, output, 0)
        source.forget(request_id)
    assert source.propose("c", [31, 32], SHAPE).tokens == (33,)
    assert source.propose("c", [32, 33], SHAPE) == EMPTY


def test_drafts_of_tokens_that_are_not_committed_teach_nothing() -> None:
    source, plain = Lookup(), Lookup()
    text = [1, 2, 3, 4, 1, 2, 3]
    for each in (source, plain):
        each.learn("a", text, 4)
        each.propose("a", text, SHAPE)
    for guess in range(10):
        source.propose("a", [*text, guess], SHAPE)
    text += [9, 1, 2]
    for each in (source, plain):
        each.learn("a", text, 7)
    assert len(plain.propose("a", text, SHAPE)) > 0
    assert source.propose("a", text, SHAPE) == plain.propose("a", text, SHAPE)


def test_matches_that_mislead_lose_trust() -> None:
    """The same two tokens come again and again, and never with the same ones after them."""
    source, text, sums = Lookup(factor=8.0), [1, 2], []
    for token in range(10, 70):
        text += [token, 1, 2]
        source.learn("a", text, len(text) - 3)
        sums.append(sum(source.propose("a", text, Shape(depth=1, width=16, nodes=16)).chances))
    assert sums[0] > 0.3
    assert sums[-1] < 0.1


# --- recycling -----------------------------------------------------------------------------------------------------


def test_the_last_observation_of_a_token_counts() -> None:
    source = Recycling(VOCABULARY)
    source.observe(np.array([5, 6, 5]), np.array([[1, 2], [7, 8], [6, 9]]))
    tree = source.propose("a", [5], Shape(depth=2, width=2, nodes=6))
    assert tree.child(ROOT, 1) is None
    assert tree.find([6, 7]) is not None
    assert tree.child(ROOT, 9) is not None
    source.observe(np.array([5]), np.array([[3]]))
    assert source.propose("a", [5], Shape(1, 2, 2)).tokens == (3,)
    source.observe(np.array([5]), np.arange(20)[None])  # more than are kept
    assert source.propose("a", [5], Shape(1, 20, 20)).tokens == tuple(range(SUCCESSORS))


def test_ranks_are_measured_by_what_comes() -> None:
    """The guess says the likeliest comes most often; here it is always the second."""
    source = Recycling(VOCABULARY)
    source.observe(np.array([5]), np.array([[1, 2, 3]]))
    before = source.propose("a", [5], Shape(1, 2, 2))
    assert before.chances == pytest.approx(ACCEPTANCE[:2])
    source.learn("a", [5, 2] * 50, 0)
    after = source.propose("a", [5], Shape(1, 2, 2))
    assert after.tokens == (1, 2)
    assert after.chances[0] < 0.1
    assert after.chances[1] > 0.8


# --- trigram -------------------------------------------------------------------------------------------------------


def test_trigrams_count_what_followed() -> None:
    source = Trigram()
    source.learn("a", [1, 2, 3, 1, 2, 3, 1, 2, 4], 0)
    tree = source.propose("b", [1, 2], Shape(depth=1, width=4, nodes=4))
    assert tree.tokens == (3, 4)
    assert tree.chances == pytest.approx((2 / 5, 1 / 5))  # three counts, two different tokens


def test_of_many_successors_the_rarest_gives_way() -> None:
    source = Trigram()
    for token in [*range(8), *range(7), 20]:
        source.learn("a", [1, 2, token], 2)
    tree = source.propose("a", [1, 2], Shape(1, 20, 20))
    assert set(tree.tokens) == {*range(7), 20}


def test_the_pair_not_met_for_the_longest_gives_way() -> None:
    source = Trigram(contexts=2)
    for text in ([1, 1, 5], [2, 2, 6], [1, 1, 5], [3, 3, 7]):
        source.learn("a", text, 2)
    assert len(source) == 2
    assert source.propose("a", [1, 1], SHAPE).tokens == (5,)
    assert source.propose("a", [2, 2], SHAPE) == EMPTY


# --- bounds and tenants --------------------------------------------------------------------------------------------


def test_memory_is_bounded() -> None:
    rng = random.Random(0)
    lookup = Lookup(own_tokens=1000, shared_tokens=500, requests=4)
    trigram, recycling = Trigram(contexts=300), Recycling(VOCABULARY)
    matrix_bytes = recycling.memory_bytes
    text = [rng.randrange(VOCABULARY) for _ in range(10_000)]
    for source in (lookup, trigram, recycling):
        feed(source, "long", text, 0, stride=100)
    for number in range(20):
        lookup.learn(str(number), text, 0)
    for number in range(16, 20):
        lookup.forget(str(number))
    assert lookup.memory_bytes <= 4 * (2 * 500 + MAX_MATCH)
    for number in range(20):
        lookup.learn(str(number), text, 0)
    assert 4 * 4 * 1000 <= lookup.memory_bytes <= 4 * (2 * 500 + MAX_MATCH) + 4 * 4 * (2 * 1000 + MAX_MATCH)
    assert len(trigram) == 300
    assert recycling.memory_bytes == matrix_bytes == VOCABULARY * SUCCESSORS * 4


@every_source
@given(texts=st.lists(st.tuples(st.sampled_from("ab"), TEXTS), max_size=6))
def test_tenants_never_see_each_other(make: Callable[[], Source], texts: list[tuple[str, list[int]]]) -> None:
    """A tenant's drafts are what they would be if it were alone."""
    together, alone = PerTenant(make), make()
    for number, (tenant, text) in enumerate(texts):
        feed(together.of(tenant), str(number), text, len(text) // 2)
        together.forget(tenant, str(number))
        if tenant == "a":
            feed(alone, str(number), text, len(text) // 2)
            alone.forget(str(number))
        for _, asked in texts:
            assert together.of("a").propose("new", asked, SHAPE) == alone.propose("new", asked, SHAPE)


def test_tenants_give_way_to_newer_ones() -> None:
    tenants = PerTenant(Trigram, limit=2)
    first = tenants.of("first")
    tenants.of("second")
    assert tenants.of("first") is first
    tenants.of("third")
    tenants.forget("second", "its request")
    assert len(tenants) == 2
    assert tenants.of("first") is first
    assert tenants.of("second") is not tenants.of("first")


# --- their parts ---------------------------------------------------------------------------------------------------


def test_recent_things() -> None:
    made = itertools.count()
    recent = Recent(lambda: next(made), limit=2)
    assert [recent.get("a"), recent.get("b"), recent.get("a"), recent.get("c")] == [0, 1, 0, 2]
    assert recent.peek("b") is None
    assert recent.pop("a") == 0
    assert recent.pop("a") is None
    assert len(recent) == 1
    with pytest.raises(ValueError, match="at least one"):
        Recent(int, 0)


@given(guess=st.floats(0.0, 1.0), outcomes=st.lists(st.booleans(), max_size=3000))
def test_rates_stay_chances(guess: float, outcomes: list[bool]) -> None:
    rates = Rates([guess])
    for outcome in outcomes:
        rates.note(0, outcome)
    assert 0.0 <= rates[0] <= 1.0


def test_rates_follow_what_changes() -> None:
    rates = Rates([0.5])
    for outcome in (True, False):
        for _ in range(5000):
            rates.note(0, outcome)
        assert rates[0] == pytest.approx(float(outcome), abs=0.05)


@given(shape=SHAPES, seed=st.integers(0, 10**6))
def test_best_first_finds_the_likeliest_paths(shape: Shape, seed: int) -> None:
    root: tuple[int, ...] = ()

    def expand(path: tuple[int, ...]) -> list[tuple[int, float, tuple[int, ...]]]:
        rng = random.Random(hash((seed, *path)))
        chances = sorted((rng.random() / 4 for _ in range(rng.randint(0, 4))), reverse=True)
        return [(token, chance, (*path, token)) for token, chance in enumerate(chances)]

    def every(path: tuple[int, ...], value: float) -> list[float]:
        if len(path) == shape.depth:
            return []
        found = []
        for _, chance, after in expand(path)[: shape.width]:
            found += [value * chance, *every(after, value * chance)]
        return found

    tree = best_first(root, expand, shape)
    check(tree, shape)
    assert tree.path_chances() == pytest.approx(sorted(every((), 1.0), reverse=True)[: shape.nodes])
