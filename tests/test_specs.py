"""Corrections and losses survive the way into plain data, YAML and one line of text, and back."""

import itertools
import json
from importlib.util import find_spec

import components
import numpy as np
import pytest
from hypothesis import given

import iscorrect as ic
from iscorrect import (
    AGGREGATIONS,
    OBJECTIVES,
    PRESETS,
    InputError,
    PolicyLoss,
    parse,
    parse_loss,
    to_dict,
    to_text,
)
from iscorrect.loss import bounds, caps, rules, specs, terms
from iscorrect.testing.strategies import corrections, losses

EVERY = list(itertools.product(PRESETS, OBJECTIVES, AGGREGATIONS))


def aggregation(name):
    return AGGREGATIONS[name](*([1024] if name == "seq-mean-token-sum-norm" else []))


def through_yaml(config):
    yaml = pytest.importorskip("yaml")
    return yaml.safe_load(yaml.safe_dump(config))


def through_omegaconf(config):
    omegaconf = pytest.importorskip("omegaconf")
    text = omegaconf.OmegaConf.to_yaml(omegaconf.OmegaConf.create(config))
    return omegaconf.OmegaConf.create(text)


def through_json(config):
    return json.loads(json.dumps(config))


def as_it_is(config):
    return config


ROUTES = [as_it_is, through_json, through_yaml, through_omegaconf]


@pytest.mark.parametrize(("preset", "objective", "aggregated"), EVERY)
def test_every_preset_objective_and_aggregation_comes_back(preset, objective, aggregated):
    loss = PolicyLoss(
        correction=PRESETS[preset](), objective=OBJECTIVES[objective](),
        aggregation=aggregation(aggregated),
    )
    for route in (through_json, through_yaml) if find_spec("yaml") else (through_json,):
        assert parse_loss(route(to_dict(loss))) == loss
    assert parse_loss(to_text(loss)) == loss
    assert to_text(loss).split()[0].partition(":")[0] in PRESETS


@pytest.mark.parametrize("route", ROUTES)
@given(loss=losses())
def test_a_drawn_loss_comes_back_from_every_form(route, loss):
    assert parse_loss(route(to_dict(loss))) == loss
    assert parse_loss(to_text(loss)) == loss
    assert parse_loss(f"  {to_text(loss)} ") == loss


@pytest.mark.parametrize("route", ROUTES)
@given(correction=corrections())
def test_a_drawn_correction_comes_back_from_every_form(route, correction):
    assert parse(route(to_dict(correction))) == correction
    assert parse(to_text(correction)) == correction
    assert "\n" not in to_text(correction)
    assert " " not in to_text(correction)


@pytest.mark.parametrize(
    "correction",
    [
        ic.token_tis(cap=ic.IonidesCap()),
        ic.sequence_mis(low=0.25, high=ic.ESSCap(0.3)),
        ic.Correction(level="segment", bound=ic.Truncate(ic.MSEOptimalCap()), nonfinite="raise"),
        ic.Correction(bound=ic.SignedTruncate(0.1), reject=(ic.Veto(high=1e5), ic.BinaryKL())),
        ic.Correction(level="prefix", normalize=True, nonfinite="neutral"),
        ic.dppo(limit=0.05, divergence="kl", cap=1 / 3),
    ],
    ids=to_text,
)
def test_what_depends_on_the_data_and_what_all_presets_take_comes_back(correction):
    assert parse(to_text(correction)) == correction
    assert parse(through_json(to_dict(correction))) == correction


@pytest.mark.parametrize(
    ("correction", "text"),
    [
        (ic.token_tis(), "token-tis"),
        (ic.token_tis(cap=3), "token-tis:cap=3"),
        (ic.token_tis(cap=ic.IonidesCap()), "token-tis:cap=ionides"),
        (ic.sequence_mis(high=None), "sequence-mis:high=none"),
        (
            ic.Correction(level="sequence", bound=ic.Truncate(ic.ESSCap(0.9)), reject=(ic.Veto(),)),
            "correction:level=sequence,bound=truncate(cap=ess(target=0.9)),reject=veto",
        ),
        (
            ic.Correction(reject=(ic.Veto(low=0.5), ic.BinaryKL(limit=0.2)), normalize=True),
            "correction:reject=veto(low=0.5)+binary-kl(limit=0.2),normalize=true",
        ),
    ],
)
def test_text_is_what_one_would_write(correction, text):
    assert to_text(correction) == text
    assert parse(text) == correction


def test_yaml_as_a_person_writes_it():
    yaml = pytest.importorskip("yaml")
    config = yaml.safe_load("""
        correction: {level: sequence, bound: truncate(cap=2), reject: [{name: veto, low: 1e-4}]}
        objective: {name: ppo-clip, high: 1.28}
        aggregation: seq-mean-token-sum-norm
        horizon: 1024
        reference-kl: {coefficient: 1e-3}
    """)
    assert parse_loss(config) == PolicyLoss(
        correction=ic.Correction(
            level="sequence", bound=ic.Truncate(2.0), reject=(ic.Veto(low=1e-4),)
        ),
        objective=ic.PPOClip(high=1.28), aggregation="seq-mean-token-sum-norm", horizon=1024,
        reference_kl=ic.ReferenceKL(coefficient=1e-3),
    )
    assert parse_loss({}) == parse_loss("") == PolicyLoss()


def test_a_list_of_rules_is_as_good_as_a_tuple():
    assert ic.Correction(reject=[ic.Veto()]) == ic.Correction(reject=(ic.Veto(),))
    assert hash(ic.Correction(reject=[ic.Veto()]))


def test_what_is_a_part_already_is_taken_as_it_is():
    assert parse(ic.icepop()) == ic.icepop()
    loss = PolicyLoss(objective=ic.CISPO())
    assert parse_loss(loss) is loss
    assert parse_loss({"correction": ic.icepop(), "objective": "cispo"}).correction == ic.icepop()


def test_every_part_of_the_library_has_a_name():
    for module, table in ((bounds, specs.BOUNDS), (rules, specs.RULES), (caps, specs.CAPS),
                          (terms, specs.REFERENCE)):
        assert set(components.parts(module).values()) == set(table.values())


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: parse("token-tsi"), ("did you mean 'token-tis'",)),
        (lambda: parse("token-tis:capp=2"), ("argument of token-tis", "cap", "'capp=2'")),
        (lambda: parse("token-tis:cap"), ("key=value", "'cap'")),
        (lambda: parse("token-tis:cap=ioniedes"), ("did you mean 'ionides'", "cap")),
        (lambda: parse("icepop:low=abc"), ("low", "'abc'")),
        (lambda: parse("correction:bound=trunkate"), ("did you mean 'truncate'",)),
        (lambda: parse(2), ("text, a dictionary, or a Correction", "got 2")),
        (lambda: parse({"level": "sequnce"}), ("level", "'sequnce'")),
        (lambda: parse_loss("token-tis icepop"), ("correction", "given once")),
        (lambda: parse_loss("token-tis overr=kept"), ("argument of PolicyLoss", "'overr=kept'")),
        (lambda: parse_loss("token-tis seq-mean-token-sum-norm"), ("horizon",)),
        (lambda: parse_loss("seq-mean-token-sum-norm:horizon=1.5"), ("horizon", "1.5")),
        (lambda: parse_loss({"aggregation": "seq-mean-token-sum-norm", "horizon": 0.5}),
         ("horizon", "0.5")),
        (
            lambda: to_dict(ic.Correction(bound=lambda ratio, evidence: ratio)),
            ("bound", "has a name", "replace"),
        ),
    ],
)
def test_messages_say_what_there_is(call, words):
    with pytest.raises(InputError) as error:
        call()
    for word in words:
        assert word in str(error.value), error.value


def test_hydra_reads_a_loss_from_its_configuration():
    instantiate = pytest.importorskip("hydra.utils").instantiate
    omegaconf = pytest.importorskip("omegaconf")
    loss = PolicyLoss(
        correction=ic.Correction(level="sequence", reject=(ic.Veto(low=1e-4),)),
        objective=ic.PPOClip(high=1.28), aggregation="sum",
    )
    for config in (to_dict(loss), to_text(loss)):
        target = {"_target_": "iscorrect.parse_loss", "config": config}
        assert instantiate(omegaconf.OmegaConf.create(target)) == loss
    parts = {
        "_target_": "iscorrect.Correction", "level": "sequence", "_convert_": "all",
        "reject": [{"_target_": "iscorrect.Veto", "low": 1e-4}],
    }
    assert instantiate(omegaconf.OmegaConf.create(parts)) == loss.correction


def test_numbers_of_numpy_are_written_as_numbers():
    loss = PolicyLoss(objective=ic.PPOClip(high=np.float64(2)))
    for spec in (ic.token_tis(np.float64(3.5)), loss):
        read = parse if isinstance(spec, ic.Correction) else parse_loss
        assert read(to_text(spec)) == read(through_yaml(to_dict(spec))) == spec
    assert to_text(ic.token_tis(np.float64(3.5))) == "token-tis:cap=3.5"


def test_a_loss_may_stand_in_lines():
    assert parse_loss("token-tis\n  ppo-clip\tsum\n") == parse_loss("token-tis ppo-clip sum")
