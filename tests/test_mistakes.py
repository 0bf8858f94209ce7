"""Each planted mistake is caught, no right loss is, and the page says by which check."""

import os

import mistakes
import pytest
from hypothesis import settings
from mistakes import BEGIN, FAMILIES, MISTAKES, PAGE, caught, checks_of

NAMES = [f"{name} ({family.name})" for name, family, _ in MISTAKES]


@pytest.fixture(autouse=True)
def profile():
    settings.load_profile("planted")
    yield
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))


@pytest.mark.slow
@pytest.mark.parametrize(("mistake", "family", "loss_fn"), MISTAKES, ids=NAMES)
def test_a_reference_or_micro_batches_catch_the_mistake(mistake, family, loss_fn):
    found = checks_of(family)
    assert caught(found["same as"], loss_fn) or caught(found["micro-batches"], loss_fn)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_right_loss_passes_every_check(family):
    for check in checks_of(family).values():
        check(family.loss())


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_right_loss_in_float32_passes_the_checks_that_compare(family):
    def in_float32(log_probs, *, mask, **tensors):
        narrow = {name: x.float() for name, x in tensors.items()}
        return family.loss()(log_probs.float(), mask=mask, **narrow)

    found = checks_of(family)
    for name in ("same as", "weights", "sign", "identity", "padding", "packing"):
        found[name](in_float32)
    if family.unbiased:
        found["unbiased"](in_float32)


@pytest.mark.slow
def test_the_page_shows_what_the_checks_find():
    page = PAGE.read_text(encoding="utf-8")
    assert BEGIN in page
    assert mistakes.render(page) == page


def test_the_page_names_every_mistake_and_says_that_all_are_caught():
    page = PAGE.read_text(encoding="utf-8")
    for name, family, _ in MISTAKES:
        assert f"| {name} | {family.name} |" in page
    assert f"{len(MISTAKES)} of {len(MISTAKES)} mistakes are caught" in page
    assert len(MISTAKES) >= 25
