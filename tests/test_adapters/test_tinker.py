"""tinker's own client and the cookbook's data, with a loss of this library."""

import pytest
import torch
from drawn import Worst, drawn
from hypothesis import given, strategies as st
from outcome import record
from stubs import real

from iscorrect import InputError, PolicyLoss, ReferenceKL, sequence_mis, token_tis
from iscorrect.adapters.tinker import custom_loss
from iscorrect.dumps import DumpWriter, read_dump

client, types, data_processing, rl = real(
    "tinker", "tinker.lib.public_interfaces.training_client", "tinker.types",
    "tinker_cookbook.rl.data_processing", "tinker_cookbook.rl.types",
)
pytestmark = pytest.mark.filterwarnings("ignore")


def datum(**inputs):
    n = len(inputs["logprobs"])
    tensors = {"target_tokens": torch.arange(n)} | inputs
    return types.Datum(
        model_input=types.ModelInput.from_ints(list(range(n))),
        loss_fn_inputs={k: types.TensorData.from_torch(x) for k, x in tensors.items()},
    )


class Forward:
    """What the service returns of a forward pass."""

    def __init__(self, log_probs):
        self.loss_fn_outputs = [{"logprobs": types.TensorData.from_torch(x)} for x in log_probs]


def weights_sent(data, policy_loss, log_probs):
    """The weights that its client sends to the server, its loss and its metrics."""
    done = client.TrainingClient._compute_custom_loss(
        data, custom_loss(policy_loss), Forward(log_probs)
    )
    weights = []
    for sent in done.data:
        x = sent.loss_fn_inputs["weights"]
        weights.append(x.to_torch() if hasattr(x, "to_torch") else torch.as_tensor(x))
    return weights, done.loss_sum, done.metrics


def test_its_client_sends_the_weighted_advantages():
    worst = Worst()

    @given(drawn(), st.sampled_from(["sum", "token-mean"]))
    def agree(batch, how):
        batch = batch.to(torch.float32)
        if not batch.mask.any():
            return
        data = [
            datum(logprobs=r, advantages=a, mask=m.float())
            for r, a, m in zip(batch.rollout_log_probs, batch.advantages, batch.mask, strict=True)
        ]
        loss_fn = PolicyLoss(correction=token_tis(cap=2.0), aggregation=how)
        weights, loss, metrics = weights_sent(data, loss_fn, list(batch.log_probs))
        ratio = (batch.log_probs - batch.rollout_log_probs).exp().clamp(max=2.0)
        n = 1 if how == "sum" else batch.mask.sum()
        expected = torch.where(batch.mask, ratio * batch.advantages / n, 0)
        assert worst.add(
            (loss, torch.stack(weights)), (-(expected * batch.log_probs).sum(), expected)
        ) < 1e-5
        assert metrics["batch/tokens"] == batch.mask.sum()
        assert all(isinstance(x, float) for x in metrics.values())

    agree()
    record(
        "tinker", "TrainingClient._compute_custom_loss", distribution="tinker", loss=worst.loss,
        gradient=worst.gradient,
    )


def test_data_of_the_cookbook_go_in_as_they_are(tmp_path):
    answer = rl.TokensWithLogprobs(tokens=[5, 6, 7], maybe_logprobs=[-0.5, -1.0, -2.0])
    step = rl.Transition(
        ob=types.ModelInput.from_ints([1, 2, 3]), ac=answer, reward=1.0, episode_done=True
    )
    trajectory = rl.Trajectory(transitions=[step], final_ob=types.ModelInput.empty())
    data = data_processing.trajectory_to_data(trajectory, 1.5)
    log_probs = [torch.full((len(data[0].loss_fn_inputs["logprobs"].data),), -1.0)]
    loss = custom_loss(PolicyLoss(aggregation="sum"), DumpWriter(tmp_path))
    client.TrainingClient._compute_custom_loss(data, loss, Forward(log_probs))
    assert read_dump(tmp_path).mask.sum() == 3
    weights, _, metrics = weights_sent(
        data, PolicyLoss(correction=sequence_mis(high=10.0), aggregation="sum"), log_probs
    )
    assert metrics["batch/tokens"] == 3
    ratio = torch.tensor(-3.0 + 3.5).exp()
    torch.testing.assert_close(weights[0][-3:], 1.5 * ratio.expand(3))
    assert not weights[0][:-3].any()
    record(
        "tinker", "trajectory_to_data of tinker-cookbook", distribution="tinker",
        gradient=(weights[0][-3:] - 1.5 * ratio).abs().max().item(),
    )


def test_a_datum_without_a_mask_counts_as_a_whole_and_does_not_touch_the_others():
    rollout = [torch.tensor([0.0, -2.0, -0.5]), torch.tensor([-1.0, -1.0])]
    current = [torch.tensor([-1.0, -2.0, -0.5]), torch.tensor([-1.0, -1.0])]
    advantages = [torch.tensor([5.0, 1.0, 1.0]), torch.ones(2)]
    data = [
        datum(logprobs=rollout[0], advantages=advantages[0], mask=torch.tensor([0.0, 1.0, 1.0])),
        datum(logprobs=rollout[1], advantages=advantages[1]),
    ]
    _, loss, metrics = weights_sent(data, PolicyLoss(correction=token_tis()), current)
    assert metrics["batch/tokens"] == 4
    assert loss == pytest.approx(1.125)


def test_a_datum_that_cannot_be_used_is_named():
    ones = torch.ones(3)
    good = dict(logprobs=-ones, advantages=ones)
    loss_fn, current = PolicyLoss(aggregation="sum"), [-ones, -ones]
    with pytest.raises(InputError, match=r"data\[1\].*'logprobs'"):
        lacking = datum(**good)
        del lacking.loss_fn_inputs["logprobs"]
        weights_sent([datum(**good), lacking], loss_fn, current)
    with pytest.raises(InputError, match=r"`advantages\[1\]` must be 3 tokens long"):
        weights_sent([datum(**good), datum(**good | {"advantages": ones[:2]})], loss_fn, current)
    with pytest.raises(InputError, match=r"data\[1\].*pass weights of 0 and 1 as mask"):
        weights_sent([datum(**good), datum(**good, weights=ones)], loss_fn, current)
    with pytest.raises(InputError, match=r"data\[1\] mask.*0 and 1"):
        weights_sent([datum(**good), datum(**good, mask=ones / 2)], loss_fn, current)


def test_weights_beside_a_mask_are_left_to_the_caller():
    ones = torch.ones(3)
    given = datum(logprobs=-ones, advantages=ones, weights=ones / 2, mask=ones)
    _, loss, _ = weights_sent([given], PolicyLoss(aggregation="sum"), [-ones])
    assert loss == pytest.approx(3.0)


def test_a_penalty_towards_a_reference_is_refused_at_once():
    with pytest.raises(InputError, match="from the advantages"):
        custom_loss(PolicyLoss(reference_kl=ReferenceKL(coefficient=0.1)))
