"""Specs are values: frozen, hashable, printable, and readable back from what they print."""

import dataclasses
import inspect

import pytest
import torch

import iscorrect as ic
from iscorrect import PRESETS, PolicyLoss

SPECS = [
    *(preset() for preset in PRESETS.values()),
    ic.Correction(level="prefix", bound=ic.Clip(0.5, 2.0), normalize=True, nonfinite="neutral"),
    ic.Correction(bound=ic.Truncate(ic.IonidesCap()), reject=(ic.Veto(high=100.0),)),
    ic.Correction(bound=ic.Mask(high=ic.ESSCap(0.3)), reject=(ic.BinaryKL(), ic.Veto())),
    ic.Correction(bound=ic.Truncate(ic.MSEOptimalCap())),
    PolicyLoss(
        correction=ic.sequence_tis(), objective=ic.PPOClip(low=None, dual=3.0), over="kept",
        aggregation="seq-mean-token-sum-norm", horizon=512, reference_kl=ic.ReferenceKL(),
    ),
    PolicyLoss(objective=ic.CISPO(low=0.5)),
]


@pytest.mark.parametrize("spec", SPECS, ids=repr)
def test_a_spec_evaluates_back_from_its_repr(spec):
    again = eval(repr(spec), vars(ic))
    assert again == spec
    assert hash(again) == hash(spec)


@pytest.mark.parametrize("spec", SPECS, ids=repr)
def test_a_spec_cannot_be_changed(spec):
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.anything = 1


@pytest.mark.parametrize("name", PRESETS)
def test_parsing_a_name_gives_the_preset_and_its_arguments_fill_it(name):
    assert ic.parse(name) == PRESETS[name]()
    numbers = {
        key: parameter.default
        for key, parameter in inspect.signature(PRESETS[name]).parameters.items()
    }
    text = ",".join(f"{k}={'none' if v is None else v}" for k, v in numbers.items())
    assert ic.parse(f"{name}:{text}") == PRESETS[name]()


def test_parsing_reads_numbers_words_and_none():
    assert ic.parse("sequence-mis:high=3") == ic.sequence_mis(high=3.0)
    assert ic.parse("token-mis:low=0.5,high=none") == ic.token_mis(low=0.5, high=None)
    assert ic.parse("dppo:divergence=kl,limit=0.05") == ic.dppo(limit=0.05, divergence="kl")


def test_every_preset_is_a_public_function():
    for name, preset in PRESETS.items():
        assert getattr(ic, name.replace("-", "_")) is preset


@pytest.mark.parametrize(
    ("correction", "scope"),
    [
        (ic.token_tis(), "token"),
        (ic.confidence_is(), "token"),
        (ic.sequence_tis(), "sequence"),
        (ic.geometric_rs(), "sequence"),
        (ic.token_tis(ic.IonidesCap()), "batch"),
        (ic.pareto_is(), "batch"),
        (ic.Correction(normalize=True), "batch"),
        (ic.Correction(bound=lambda ratio, evidence: ratio), "batch"),
    ],
)
def test_a_correction_says_how_far_it_looks(correction, scope):
    assert correction.scope == scope


def test_a_loss_looks_as_far_as_its_farthest_part():
    assert PolicyLoss(correction=ic.token_tis(), objective=ic.PPOClip()).scope == "token"
    assert PolicyLoss(objective=ic.PPOClip(level="geometric")).scope == "sequence"
    assert PolicyLoss(correction=ic.icepop(), over="kept").scope == "batch"
    assert PolicyLoss(aggregation=torch.add).scope == "batch"
