from utils.training.early_stopping import EarlyStopping


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
