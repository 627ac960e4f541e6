import pytest
import torch

from utils.training.optimization import EarlyStopping, Schedule, rate_of_epoch


def rates(name, epochs, steps=1, rate=1.0, pct_start=0.2):
    """The rate of each epoch's first step."""
    optimizer = torch.optim.Adam([torch.zeros(1, requires_grad=True)], lr=rate)
    schedule = Schedule(optimizer, name, epochs * steps, pct_start)
    seen = []
    for _ in range(epochs):
        seen.append(optimizer.param_groups[0]["lr"])
        assert schedule.rate == seen[-1]
        for _ in range(steps):
            optimizer.step()
            schedule.after_step()
        schedule.after_epoch()
    return seen


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("type1", [1, 1, 0.5, 0.25, 0.125]),
        ("type2", [1, 1, 5e-5, 5e-5, 1e-5]),
        ("type3", [1, 1, 1, 1, 0.9]),
        ("PEMS", [1, 0.95, 0.95**2, 0.95**3, 0.95**4]),
        ("constant", [1, 1, 1, 1, 1]),
    ],
)
def test_stepwise_schedules(name, expected):
    assert rates(name, 5) == pytest.approx(expected)


def test_the_rate_asked_for_is_the_rate_of_the_first_epoch():
    for name in ("type1", "type2", "type3", "PEMS", "COS", "constant"):
        assert rates(name, 1, rate=0.003) == [0.003]


def test_cosine_falls_over_twenty_epochs():
    seen = rates("COS", 21)
    assert seen[10] == pytest.approx(0.5)
    assert seen[20] == pytest.approx(1e-8, abs=1e-9)


def test_one_cycle_peaks_where_asked_and_survives_extra_steps():
    seen = rates("TST", 10, steps=10, pct_start=0.3)
    assert seen[0] == pytest.approx(1 / 25)
    assert max(seen) == pytest.approx(1, abs=0.01)
    assert seen.index(max(seen)) == 3
    optimizer = torch.optim.Adam([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = Schedule(optimizer, "TST", 3, 0.5)
    for _ in range(9):
        optimizer.step()
        schedule.after_step()


@pytest.mark.parametrize(("steps", "pct_start"), [(5, 0.2), (10, 0.1), (2, 0.5), (1, 0.2), (4, 0.25)])
def test_one_cycle_without_room_for_a_way_up(steps, pct_start):
    """torch's own scheduler divides by zero where the way up is one step long."""
    seen = rates("TST", 1, steps=steps, pct_start=pct_start) + rates("TST", steps, pct_start=pct_start)
    assert all(0 < rate <= 1 for rate in seen)


@pytest.mark.parametrize("name", ["type1", "type3", "PEMS", "TST", "COS", "constant"])
def test_groups_keep_the_ratio_of_their_rates(name):
    groups = [{"params": [torch.zeros(1, requires_grad=True)], "lr": lr} for lr in (1.0, 0.03)]
    optimizer = torch.optim.Adam(groups)
    schedule = Schedule(optimizer, name, 5, 0.3)
    for _ in range(5):
        one, other = (group["lr"] for group in optimizer.param_groups)
        assert other == pytest.approx(0.03 * one, abs=1e-7)
        optimizer.step()
        schedule.after_step()
        schedule.after_epoch()


def test_an_unknown_schedule_is_an_error():
    with pytest.raises(ValueError, match="spiral"):
        rate_of_epoch("spiral", 1.0, 2)


def test_it_counts_validations_without_gain_and_says_so():
    lines = []
    stopping = EarlyStopping(patience=2, report=lines.append)
    assert [stopping.update(loss) for loss in (0.5, 0.4, 0.4, 0.3, 0.35)] == [True, True, False, True, False]
    assert not stopping.should_stop
    assert not stopping.update(0.31)
    assert stopping.should_stop
    assert stopping.lowest == 0.3
    assert lines[0] == "Validation loss decreased (inf --> 0.500000).  Saving model ..."
    assert lines[2] == "EarlyStopping counter: 1 out of 2"
    assert lines[-1] == "EarlyStopping counter: 2 out of 2"
