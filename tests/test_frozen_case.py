"""What `tests/frozen/` holds is found again, to the token and to rounding, on every machine."""

import numpy as np
import pytest

from tests import frozen_case
from tests.conftest import largest_difference


@pytest.fixture(scope="module")
def figures():
    return frozen_case.figures()


def test_prompts_and_token_ids_are_the_same_to_the_digit(figures):
    model, windows = frozen_case.build(), frozen_case.windows()[0][..., 0]
    assert model.prompts.texts(windows) == figures["prompts"]
    assert model.tokenize(windows) == figures["tokens"]


@pytest.mark.parametrize("more", [[], ["--no_prefix_cache"]])
@pytest.mark.parametrize("padding", frozen_case.PADDINGS)
def test_forecasts_and_six_losses_are_the_same(figures, padding, more):
    flags = ("--prompt_padding", padding, *more)
    assert largest_difference(frozen_case.forecasts(frozen_case.build(*flags)), figures[padding]["forecasts"]) < 1e-5
    np.testing.assert_allclose(frozen_case.losses(frozen_case.build(*flags)), figures[padding]["losses"], rtol=1e-4)


def test_the_case_is_not_trivial(figures):
    left, right = (figures[padding] for padding in frozen_case.PADDINGS)
    assert largest_difference(left["forecasts"], right["forecasts"]) > 1e-3, "padding must matter"
    assert len({len(ids) for ids in figures["tokens"]}) > 3, "prompts must differ in length"
    assert left["losses"][-1] < left["losses"][0]
