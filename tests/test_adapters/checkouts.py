"""The contracts on a checkout: python tests/test_adapters/checkouts.py slime=PATH

Known are slime, miles, prime-rl and NeMo-RL. It needs what the test suite needs, and beartype,
jaxtyping and pydantic; Megatron is a stub.
"""

import argparse
import importlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from types import SimpleNamespace

if __name__ == "__main__":  # pytest imports this file too, and its compilers stay as they are
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import contracts  # noqa: E402
import fakes  # noqa: E402
import stubs  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.distributed.nn  # noqa: E402
from drawn import Worst, drawn, fixed, gradient_of  # noqa: E402
from hypothesis import given, settings, strategies as st  # noqa: E402
from outcome import record  # noqa: E402

from iscorrect import PolicyLoss, PPOClip, log_probs_from_logits  # noqa: E402
from iscorrect.adapters.nemo_rl import from_nemo_rl  # noqa: E402
from iscorrect.adapters.prime_rl import from_prime_rl  # noqa: E402
from iscorrect.adapters.replay import support_of  # noqa: E402
from iscorrect.adapters.slime import from_slime, tis_function  # noqa: E402


def package(name, root):
    """A package whose modules can be imported without running its __init__."""
    made = fakes.module(name)
    made.__path__ = [str(Path(root, *name.split(".")))]
    return made


def load(name, path):
    spec = importlib.util.spec_from_file_location(name, path)
    made = importlib.util.module_from_spec(spec)
    fakes.module(name)
    sys.modules[name] = made
    spec.loader.exec_module(made)
    return made


def slime(root, rank=0, size=1):
    stubs.install()
    mpu = fakes.module("megatron.core.mpu")
    group = dist.group.WORLD if dist.is_initialized() else None
    for kind in ("context_parallel", "tensor_model_parallel", "data_parallel"):
        n = size if kind == "context_parallel" else 1
        setattr(mpu, f"get_{kind}_world_size", lambda *_, n=n, **__: n)
        setattr(mpu, f"get_{kind}_rank", lambda *_, n=n: rank if n > 1 else 0)
        setattr(mpu, f"get_{kind}_group", lambda *_: group)
    for name in ("slime", "slime.backends", "slime.backends.megatron_utils"):
        package(name, root)
    sys.path.append(root)
    helpers = importlib.import_module("slime.backends.megatron_utils.cp_utils")
    return SimpleNamespace(helpers=helpers, more={})


def miles(root, rank=0, size=1):
    stubs.install()
    for name in ("miles", "miles.backends"):
        package(name, root)
    sys.path.append(root)
    helpers = importlib.import_module("miles.backends.training_utils.cp_utils")
    parallel = importlib.import_module("miles.backends.training_utils.parallel")
    group = dist.group.WORLD if dist.is_initialized() else None
    alone = parallel.GroupInfo(rank=0, size=1, group=group if size == 1 else None)
    names = ("intra_dp", "intra_dp_cp", "tp", "pp", "ep", "etp", "indep_dp")
    state = parallel.ParallelState(
        **dict.fromkeys(names, alone), is_pp_last_stage=True,
        cp=parallel.GroupInfo(rank=rank, size=size, group=group),
    )
    parallel.set_parallel_state(state)
    return SimpleNamespace(helpers=helpers, more={"parallel_state": state, "max_seq_lens": None})


BASE = dict(
    skip_actor_forward_only=False, observe_training_entropy=False, qkv_format="thd",
    dump_details=None, rollout_temperature=1.0, rollout_top_p=1.0, rollout_top_k=-1,
    use_rollout_logprobs=False, use_opsm=False, advantage_estimator="grpo", eps_clip=0.2,
    eps_clip_high=0.28, eps_clip_c=None, get_mismatch_metrics=False, use_tis=True, tis_clip=2.0,
    tis_clip_low=0.0, custom_tis_function_path=None, calculate_per_token_loss=False,
    entropy_coef=0.0, use_kl_loss=False, allgather_cp=False, log_probs_chunk_size=-1,
    custom_pg_loss_reducer_function_path=None, recompute_loss_function=False,
    loss_type="policy_loss", true_on_policy_mode=False, pg_loss_type=None, sglang_enable=False,
    tis_batch_normalize=False, use_rs=False, rs_level="token", rs_lower_bound=0.4,
    rs_upper_bound=3.0, rs_veto_threshold=1e-4, tis_lower_bound=0.5, tis_upper_bound=2.0,
)


def slime_losses(name, root):
    """Its policy_loss_function from logits to gradient, with its corrections and with ours."""
    functional = torch.nn.functional
    if name == "slime":
        module = importlib.import_module("slime.backends.megatron_utils.loss")
        reducer = importlib.import_module(
            "slime.backends.megatron_utils.cp_utils"
        ).get_sum_of_sample_mean
        mis = "examples.train_infer_mismatch_helper.mis.compute_mis_weights_with_cp"
        icepop = "slime.backends.megatron_utils.loss.icepop_function"
    else:
        def cross_entropy(logits, tokens, _):
            flat = functional.cross_entropy(
                logits.reshape(-1, logits.shape[-1]), tokens.reshape(-1), reduction="none"
            )
            return flat.view(tokens.shape)

        fakes.module(
            "megatron.core.fusions.fused_cross_entropy",
            fused_vocab_parallel_cross_entropy=cross_entropy,
        )
        module = importlib.import_module("miles.backends.training_utils.loss_hub.losses")
        real = importlib.import_module("miles.backends.training_utils.cp_utils")

        def reducer(totals, lengths, masks, denominators, per_token):
            return real.get_sum_of_sample_mean(
                totals, lengths, masks, per_token, denominators=denominators
            )

        mis = (
            "examples.infra_features.train_infer_mismatch_helper.mis.compute_mis_weights_with_cp"
        )
        icepop = "miles.backends.training_utils.loss_hub.corrections.icepop_function"
    cases = [dict(), dict(tis_clip=5.0, tis_clip_low=0.5), dict(use_tis=False)]
    cases.append(dict(tis_clip=5.0, tis_clip_low=0.5, custom_tis_function_path=icepop))
    for level in ("token", "sequence", "geometric"):
        for mode in ("truncate", "clip", "mask"):
            for rejected in (None, level):
                cases.append(dict(
                    custom_tis_function_path=mis, tis_level=level, tis_mode=mode,
                    use_rs=rejected is not None, rs_level=level,
                ))
    worst, ours = Worst(), fakes.module("our_corrections")
    for i, case in enumerate(cases):
        args = argparse.Namespace(**BASE | case)
        setattr(ours, f"correct{i}", tis_function(from_slime(args)))
        mine = argparse.Namespace(**vars(args) | dict(
            use_tis=True, custom_tis_function_path=f"our_corrections.correct{i}"
        ))

        def loss_of(x, args, batch):
            reduce = reducer(
                batch["total_lengths"], batch["response_lengths"], batch["loss_masks"],
                batch["rollout_mask_sums"], args.calculate_per_token_loss,
            )
            return module.policy_loss_function(args, batch, x, reduce)[0]

        slime_parity(loss_of, mine, args, worst)
    return worst, len(cases)


def slime_parity(loss_of, ours, theirs, worst):
    @given(st.integers(0, 2**32), st.sampled_from(SCALES))
    @settings(max_examples=30, deadline=None)
    def agree(seed, scale):
        logits, batch = slime_batch(seed, scale)
        pair = [gradient_of(lambda x, a=a: loss_of(x, a, batch), logits) for a in (ours, theirs)]
        assert worst.add(*pair) < 1e-6, theirs

    agree()


SCALES = (1e-4, 0.05, 0.7, 2.0)


def slime_replay():
    """Log-probs over the ids that top-p kept, by its own function and by ours."""
    module = importlib.import_module("slime.backends.megatron_utils.loss")
    args, worst = argparse.Namespace(**BASE | {"rollout_top_p": 0.8}), Worst()

    @given(st.integers(0, 2**32))
    @settings(max_examples=100, deadline=None)
    def agree(seed):
        logits, batch = slime_batch(seed, 0.7)
        names = ("unconcat_tokens", "total_lengths", "response_lengths")
        tokens, totals, lengths = (batch[name] for name in names)
        ends = torch.tensor(totals).cumsum(0).tolist()
        rows = [logits[0, end - n - 1 : end - 1] for end, n in zip(ends, lengths, strict=True)]
        targets = [ids[-n:] for ids, n in zip(tokens, lengths, strict=True)]
        ids, offsets = [], []
        for x, target in zip(rows, targets, strict=True):
            kept = [torch.cat([row.topk(4).indices, own[None]]).unique() for row, own in zip(
                x, target, strict=True
            )]
            ids.append(torch.cat(kept).int())
            offsets.append(torch.tensor([0, *map(len, kept)]).cumsum(0).int())
        support = support_of(ids, offsets)

        def theirs(x):
            found = module.get_log_probs_and_entropy(
                x, args=args, top_p_token_ids=ids, top_p_token_offsets=offsets,
                **{name: batch[name] for name in names},
            )
            return torch.cat((found[1] if isinstance(found, tuple) else found)["log_probs"])

        def ours(x):
            parts = [x[0, e - n - 1 : e - 1] for e, n in zip(ends, lengths, strict=True)]
            return log_probs_from_logits(torch.cat(parts), torch.cat(targets), support=support)

        pairs = []
        for log_probs_of in (ours, theirs):
            leaf = logits.clone().requires_grad_()
            log_probs = log_probs_of(leaf)
            (gradient,) = torch.autograd.grad(log_probs.square().sum(), leaf)
            pairs.append((log_probs.detach(), gradient))
        assert worst.add(*pairs) < 1e-5

    agree()
    return worst


def slime_batch(seed, scale):
    draw = torch.Generator().manual_seed(seed)
    lengths, prompts, vocabulary = [3, 7, 1, 5, 9], [2, 4, 3, 1, 2], 17
    totals = [p + r for p, r in zip(prompts, lengths, strict=True)]
    tokens = [torch.randint(0, vocabulary, (n,), generator=draw) for n in totals]
    logits = torch.randn(1, sum(totals), vocabulary, generator=draw)
    log_probs, old, end = logits[0].log_softmax(-1), [], 0
    for ids, total, n in zip(tokens, totals, lengths, strict=True):
        end += total
        current = log_probs[end - n - 1 : end - 1].gather(-1, ids[-n:, None])[:, 0]
        old.append(current + 0.2 * torch.randn(n, generator=draw))
    rollout = [x + scale * torch.randn(len(x), generator=draw) for x in old]
    masks = [(torch.rand(n, generator=draw) > 0.2).int() for n in lengths]
    return logits, dict(
        unconcat_tokens=tokens, total_lengths=totals, response_lengths=lengths, log_probs=old,
        advantages=[torch.randn((), generator=draw).expand(n).clone() for n in lengths],
        rollout_log_probs=rollout, loss_masks=masks,
        rollout_mask_sums=torch.tensor([float(m.sum().clamp(min=1)) for m in masks]),
    )


def check_slime(name, root):
    loader = {"slime": slime, "miles": miles}[name]
    for case, apart in contracts.slime_context_parallel(loader, root).items():
        yield f"context parallel 2, {case}", apart, None
    world = loader(root)
    contracts.slime_switches(world)
    yield "settings and ragged or empty lists", None, None
    dist.init_process_group(
        "gloo", init_method=f"file://{tempfile.mktemp()}", rank=0, world_size=1
    )
    loader(root)
    worst, cases = slime_losses(name, root)
    yield f"policy_loss_function with {cases} settings", worst.loss, worst.gradient
    if name == "slime":
        worst = slime_replay()
        yield "log-probs over the ids that top-p kept", worst.loss, worst.gradient


def prime_rl(root):
    class Config:
        def __init__(self, **fields):
            self.__dict__.update(fields)

    kinds = ("CustomLossConfig", "DefaultLossConfig", "IPOLossConfig")
    made = {name: type(name, (Config,), {}) for name in kinds}
    fakes.module("prime_rl.configs.trainer", LossConfig=Config, TrainerConfig=Config, **made)
    fakes.module(
        "prime_rl.utils.utils",
        import_object=lambda path: getattr(
            importlib.import_module(path.rpartition(".")[0]), path.rpartition(".")[2]
        ),
    )
    module = load(
        "prime_rl.trainer.rl.loss", Path(root, "src", "prime_rl", "trainer", "rl", "loss.py")
    )

    def compute_loss(current, rollout, advantages, masks, weights, loss_fn, scale):
        return module.compute_loss(
            current, rollout, None, advantages, masks, weights, None, None, loss_fn, scale, 1, 1
        )

    def custom(kwargs):
        return module.setup_rl_loss_fn(made["CustomLossConfig"](
            import_path="iscorrect.adapters.prime_rl.loss", kwargs=kwargs
        ))

    return SimpleNamespace(module=module, compute_loss=compute_loss, custom=custom, configs=made)


def check_prime_rl(_, root):
    world = prime_rl(root)
    worst = contracts.prime_rl(world)
    yield "custom loss in compute_loss", worst.loss, worst.gradient
    own = {
        "default": (
            world.module.default_loss_fn,
            world.configs["DefaultLossConfig"](
                dppo_mask_low=0.1, dppo_mask_high=0.2, adv_tau=1.0, kl_tau=0.0
            ),
            from_prime_rl("default", 0.1, 0.2),
        ),
        "ipo": (
            world.module.ipo_loss_fn,
            world.configs["IPOLossConfig"](ipo_threshold=0.1, adv_tau=1.0, kl_tau=0.0),
            from_prime_rl("ipo", ipo_threshold=0.1),
        ),
    }
    for name, case in own.items():
        worst = prime_rl_parity(world, *case)
        yield f"{name}_loss_fn against from_prime_rl", None, worst.gradient
    prime_rl_rounds(root)
    yield "setup_optimizer with round_after_step", None, None


def prime_rl_rounds(root):
    """The page's lines are imported with the loss, before the optimiser that they reach."""
    train = Path(root, "src", "prime_rl", "trainer", "rl", "train.py").read_text()
    assert train.index("setup_rl_loss_fn(config.loss)") < train.index("= setup_optimizer(")
    for name in ("prime_rl", "prime_rl.trainer", "prime_rl.utils"):
        package(name, Path(root, "src"))
    fakes.module("dion", Muon=object)
    fakes.module("prime_rl.utils.logger", get_logger=None)
    fakes.module("prime_rl.trainer.parallel_dims", ParallelDims=object)
    config = sys.modules["prime_rl.configs.trainer"]
    config.OptimizerConfig = config.OptimizerInBackwardOffloadConfig = object
    optim = importlib.import_module("prime_rl.trainer.optim")
    exec(recipe("from prime_rl"), {})
    w = torch.nn.Parameter(torch.linspace(0.5, 1, 64))
    settings = SimpleNamespace(type="adamw", lr=1e-5, weight_decay=0.0, betas1=0.9, betas2=0.99,
                               max_norm=1.0)
    optimizer, _ = optim.setup_optimizer(settings, [("w", w)], None)
    begun = w.detach().clone()
    w.grad = torch.ones_like(w)
    optimizer.step()
    assert torch.equal(w, w.bfloat16().float())
    masters = w.detach() + optimizer.state[w]["rest"]
    assert torch.allclose(masters, begun - 1e-5, atol=1e-7)


def recipe(line):
    """The block of the page of the real model that has this line."""
    text = (HERE.parents[1] / "docs" / "lab" / "real-model.md").read_text(encoding="utf-8")
    (found,) = (block for block in text.split("```")[1::2] if line in block)
    return found


def prime_rl_parity(world, loss_fn, config, correction):
    worst, corrected = Worst(), PolicyLoss(correction=correction, aggregation="sum")

    @given(drawn())
    @settings(max_examples=200, deadline=None)
    def agree(batch):
        shift = (batch.log_probs - batch.rollout_log_probs).clamp(-300, 300)
        current = batch.rollout_log_probs + shift
        tensors = dict(advantages=batch.advantages, mask=batch.mask)
        _, ours = gradient_of(lambda x: corrected(
            x, rollout_log_probs=batch.rollout_log_probs, **tensors
        ).loss, current)
        _, theirs = gradient_of(lambda x: loss_fn(world.module.LossInputs(
            x, batch.rollout_log_probs, None, batch.advantages, batch.mask
        ), config).loss, current)
        # the losses differ by design: −Σ w A log π against −Σ ρ A
        assert worst.add((0.0, ours), (0.0, theirs)) < 1e-9

    agree()
    return worst


def nemo_rl(root):
    stubs.install()
    for name in (
        "nemo_rl", "nemo_rl.algorithms", "nemo_rl.distributed", "nemo_rl.models",
        "nemo_rl.algorithms.loss",
    ):
        package(name, root)
    for name in (
        "nemo_rl.data.chat_templates", "nemo_rl.models.policy", "nemo_rl.utils.fastokens",
        "nemo_rl.utils.logger", "nemo_rl.distributed.model_utils",
        "nemo_rl.models.dtensor.parallelize", "nemo_rl.algorithms.x_token.loss_utils",
        "nemo_rl.data", "nemo_rl.utils",
    ):
        fakes.module(name)
        sys.modules[name] = stubs.Stub(name)
    batches = stubs.Stub("nemo_rl.distributed.batched_data_dict")
    batches.BatchedDataDict = type("BatchedDataDict", (dict,), {
        "__class_getitem__": classmethod(lambda cls, _: cls)
    })
    sys.modules[batches.__name__] = batches
    folder = Path(root, "nemo_rl", "algorithms")
    interfaces = load("nemo_rl.algorithms.loss.interfaces", folder / "loss" / "interfaces.py")
    load("nemo_rl.algorithms.utils", folder / "utils.py")
    losses = load(
        "nemo_rl.algorithms.loss.loss_functions", folder / "loss" / "loss_functions.py"
    )

    def own(**changes):
        config = losses.ClippedPGLossConfig(reference_policy_kl_penalty=0.0, **changes)
        return losses.ClippedPGLossFn(config)

    return SimpleNamespace(interfaces=interfaces, own=own)


def check_nemo_rl(_, root):
    world = nemo_rl(root)
    worst = contracts.nemo_rl(world)
    what = "LossFunction with the metrics that its step reads and its split API"
    yield what, worst.loss, worst.gradient
    kinds = [
        (None, None, None), ("tis", None, 2.0), ("tis", 0.5, 5.0), ("icepop", 0.5, 5.0),
        ("seq-mask-tis", 0.9, 1.2),
    ]
    worst = Worst()
    for kind in kinds:
        for by_token in (True, False):
            nemo_rl_parity(world, worst, by_token, *kind)
    yield f"ClippedPGLossFn with {2 * len(kinds)} settings", worst.loss, worst.gradient
    nemo_rl_rounds(root)
    yield "optimizer.name with round_after_step", None, None


def nemo_rl_rounds(root):
    """The page's class is made as the workers make theirs, of parameters in float32."""
    worker = Path(root, "nemo_rl/models/policy/workers/dtensor_policy_worker.py").read_text()
    setup = Path(root, "nemo_rl/models/automodel/setup.py").read_text()
    assert 'get_class(self.cfg["optimizer"]["name"])' in worker
    assert 'get_class(config["optimizer"]["name"])' in setup
    assert "torch_dtype=torch.float32" in worker and "torch_dtype=torch.float32" in setup
    made = fakes.module("rounded")
    exec(recipe("RoundedAdamW"), vars(made))
    w = torch.nn.Parameter(torch.linspace(0.5, 1, 64))
    optimizer = made.RoundedAdamW((p for p in [w]), lr=1e-5, weight_decay=0.0)
    w.grad = torch.ones_like(w)
    optimizer.step()
    assert torch.equal(w, w.bfloat16().float()) and optimizer.state[w]["rest"].any()


def nemo_rl_parity(world, worst, by_token, *kind):
    @given(st.integers(0, 2**32), st.sampled_from(SCALES))
    @settings(max_examples=30, deadline=None)
    def agree(seed, scale):
        batch = fixed(seed, rows=6, scale=scale)
        pair = nemo_rl_pair(world, batch, by_token, *kind)
        assert worst.add(*pair) < 1e-5, (kind, by_token)

    agree()


def nemo_rl_pair(world, batch, by_token, kind, low, high):
    from iscorrect.adapters.nemo_rl import CorrectedLoss

    data = contracts.nemo_data(batch)
    mask = data["token_mask"][:, 1:] * data["sample_mask"][:, None]
    counts = ((data["sample_mask"] * mask.any(-1)).sum(), mask.sum())
    theirs = world.own(
        token_level_loss=by_token, use_importance_sampling_correction=True,
        truncated_importance_sampling_type=kind, truncated_importance_sampling_ratio=high,
        truncated_importance_sampling_ratio_min=low,
    )
    ours = CorrectedLoss(PolicyLoss(
        correction=from_nemo_rl(True, high, low, kind), objective=PPOClip(),
        aggregation="token-mean" if by_token else "seq-mean-token-mean",
    ))
    return (
        gradient_of(lambda x: ours(data, *counts, next_token_logprobs=x)[0], batch.log_probs),
        gradient_of(lambda x: theirs(x, data, *counts)[0], batch.log_probs),
    )


CHECKS = {
    "slime": check_slime, "miles": check_slime, "prime-rl": check_prime_rl,
    "NeMo-RL": check_nemo_rl,
}


def main(argument):
    name, _, path = argument.partition("=")
    root = str(Path(path).resolve())
    version = os.environ.get("VERSION") or subprocess.run(
        ["git", "-C", root, "log", "-1", "--format=%h, %as"], capture_output=True, text=True,
        check=False,
    ).stdout.strip() or "unknown commit"
    for what, loss, gradient in CHECKS[name](name, root):
        record(name, what, version=version, loss=loss, gradient=gradient)
        numbers = (f"{x:.1e}" for x in (loss, gradient) if x is not None)
        print(f"{name} {version}: {what}: {' '.join(numbers) or 'passed'}", flush=True)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
