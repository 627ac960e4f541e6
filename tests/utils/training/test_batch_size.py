import torch

from models.PatchTST import Model
from utils.cli.options import get_parser
from utils.training.batch_size import _try_step


def test_a_trial_leaves_the_model_as_it_was(flags):
    """PatchTST's means of its batches, too: the trial's are made up."""
    args = get_parser().parse_args([*flags, "--model", "PatchTST", "--patch_len", "6"])
    model = Model(args)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert _try_step(4, args, model) == 4
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
