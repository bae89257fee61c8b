"""Which workers start and which go."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from cluster.policy.scaling import Plan, ScalingReason, Staff, plan
from tidemill.core.model import Role

staffs = st.lists(
    st.builds(
        Staff, st.integers(0, 40).map(lambda i: f"verify-{i}"), st.sampled_from(Role), st.integers(0, 9), st.booleans()
    ),
    max_size=9,
    unique_by=lambda each: each.name,
)
wishes = st.dictionaries(st.sampled_from(Role), st.integers(0, 5))


@given(staffs, wishes, st.randoms(use_true_random=False))
def test_there_are_as_many_as_asked_for_and_the_least_busy_go(
    workers: list[Staff], wanted: dict[Role, int], random: object
) -> None:
    decision = plan(workers, wanted)
    shuffled = list(workers)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert plan(shuffled, wanted) == decision, "the order of workers does not matter"
    staying = [each for each in workers if not each.leaving]
    now = Counter(each.role for each in staying)
    if wanted.get(Role.VERIFY, now[Role.VERIFY]) == 0:
        assert decision.reason is ScalingReason.NO_VERIFY_LEFT
        assert decision.choice == Plan()
        return
    started, leave = decision.choice.start, set(decision.choice.leave)
    after = Counter(each.role for each in staying if each.name not in leave) + Counter(role for _, role in started)
    assert all(after[role] == wanted.get(role, now[role]) for role in Role)
    names = {name for name, _ in started}
    assert len(names) == len(started)
    assert not names & {each.name for each in workers}, "a name belongs to one worker"
    for goes in (each for each in staying if each.name in leave):
        stays = [each for each in staying if each.role is goes.role and each.name not in leave]
        assert all(each.residual >= goes.residual for each in stays)


def test_the_reason_says_what_happens() -> None:
    workers = [Staff("verify-0", Role.VERIFY), Staff("prefill-0", Role.PREFILL)]
    assert plan(workers, {Role.VERIFY: 1}).reason is ScalingReason.AS_ASKED
    up = plan(workers, {Role.VERIFY: 3})
    assert (up.choice.start, up.reason) == ((("verify-1", Role.VERIFY), ("verify-2", Role.VERIFY)), ScalingReason.UP)
    assert plan(workers, {Role.PREFILL: 0}).choice.leave == ("prefill-0",)
    assert plan(workers, {Role.PREFILL: 0, Role.VERIFY: 2}).reason is ScalingReason.BOTH
