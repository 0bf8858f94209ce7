"""The causes that are known, each with the control that settles it; patterns share them."""

from __future__ import annotations

from iscorrect.diagnose.findings import Cause

ROUNDING = Cause(
    "numerical noise",
    "score the same tokens twice with the trainer under another batch shape; float32 on both sides"
    " must make it vanish",
)
LARGER = Cause(
    "kernels that differ by more than 16-bit rounding",
    "score the same tokens twice with each side alone; the side that disagrees with itself is at"
    " fault",
)
COPIED = Cause(
    "one side copied from the other",
    "in bypass mode old_log_probs is the engine's: dump the trainer's own pass over the tokens",
    ("log_probs",),
)
BITWISE = Cause(
    "engine and trainer that agree to the bit",
    "change one weight of the trainer; the log-probs must move apart",
)

# Values that do not belong to their tokens.
SHIFTED = Cause(
    "log-probs shifted against each other",
    "compare token ids on both sides; log-probs of the next token belong to positions 1.. of the"
    " input",
)
STOP_TOKEN = Cause(
    "stop token appended, not sampled",
    "mask the last token, or keep the log-prob that the engine gave when it sampled it",
)
TURN_END = Cause(
    "end-of-turn tokens added by the template",
    "mask the tokens that the chat template adds after a turn; nobody sampled them",
    ("turn",),
)
MISSING = Cause(
    "missing values filled with a constant",
    "count the null log-probs that the engine returns before they are put into tensors",
)
SENTINEL = Cause(
    "a sentinel in place of −inf",
    "look for the value in the engine's source: servers write −9999 where JSON has no −inf",
)
ENVIRONMENT = Cause(
    "environment tokens in the mask",
    "print the masked tokens around a turn's boundary; tool and user text must have mask 0",
    ("turn",),
)
PREFILLED = Cause(
    "forced or prefilled tokens in the mask",
    "look for text that the request prescribed: an assistant prefix, a grammar, a tool's schema",
)
NEGATED = Cause(
    "negative log-likelihoods in place of log-probs", "print one value of each side: -0.2 or 0.2",
)
CANDIDATE = Cause(
    "log-probs of another candidate of the position",
    "look the sampled id up among the candidates by its key, not by its rank",
    ("top_k_ids", "top_k_log_probs"),
)
GREEDY = Cause(
    "a sampler that keeps one token",
    "look for temperature 0 or top_k=1 among the sampling parameters",
)

# Fields of a dump that contradict each other.
CANDIDATES_RAW = Cause(
    "candidates reported before temperature and penalties, the sampled token after",
    "compare the first candidate's log-prob with the sampled one's where they are the same token",
)
CANDIDATES_SHIFTED = Cause(
    "candidates of another position", "compare top_k_ids at t with token_ids at t − 1 and t + 1",
)
ENTROPY_SHIFTED = Cause(
    "entropy of another position", "compute entropy and log-prob from the same row of logits",
)
ENTROPY_OTHER = Cause(
    "entropy in other units or of other logits",
    "recompute the entropy of ten tokens from the logits that old_log_probs came from, in nats",
)
TWO_PASSES = Cause(
    "two passes of the trainer that disagree",
    "score one batch twice before any optimizer step, with dropout off: packing, attention kernel"
    " or batch shape is what differs",
)
LATER_UPDATES = Cause(
    "log_probs taken after optimizer steps",
    "dump the first mini-batch, before the weights move; there both passes must agree",
)

# Other tokens, or the same after another text.
DIVERGED = Cause(
    "different tokens from a position on",
    "compare the token ids that the engine returned with those that the trainer scored; do not"
    " decode and tokenise again",
)
PREEMPTED = Cause(
    "sequences preempted and resumed",
    "count the engine's preemptions and recomputations; none may happen in a control run",
)
WRONG_TOKENS = Cause(
    "wrong tokens",
    "compare the token ids that the engine returned with those that the trainer scored, and their"
    " number with the completion tokens that the engine counts",
)
SPECULATIVE = Cause(
    "speculative decoding that reports the draft's log-probs", "switch speculative decoding off",
)
WRONG_PROMPT = Cause(
    "wrong prompt template",
    "compare the prompt's token ids on both sides: system prompt, template, BOS, truncation",
)
HISTORY = Cause(
    "conversation histories rendered differently",
    "compare the token ids before the second turn on both sides; thinking that is cut from earlier"
    " turns, tool calls that are written anew",
    ("turn",),
)
PACK_LEAK = Cause(
    "state that leaks between neighbours of a packed row",
    "score a row packed and alone: cu_seqlens, position ids, or convolution and SSM states",
    ("pack",),
)
POSITIONS = Cause(
    "another model definition, by position",
    "compare the configurations: rope scaling, sliding windows, maximal length",
)

# The sampler.
ENGINE_TEMPERED = Cause(
    "temperature: engine divides its logits, trainer does not",
    "divide the trainer's logits by the sampling temperature before the softmax",
)
TRAINER_TEMPERED = Cause(
    "temperature: trainer divides its logits, engine does not",
    "divide the engine's logits by the sampling temperature before the softmax",
)
RAW_TEMPERED = Cause(
    "temperature: raw log-probs reported, tempered sampler and trainer",
    "set the engine's logprobs_mode to processed_logprobs (vLLM), or report after scaling",
    ("entropy",),
)
SCALING = Cause(
    "another scale of the logits",
    "compare the configurations: logit scale, soft-capping, an adapter's alpha, tied heads",
)
TRUNCATION = Cause(
    "top-p/top-k truncation",
    "set top_p=1, top_k=-1, min_p=0, or renormalise the trainer over the kept set"
    " (iscorrect.Support)",
)
GRAMMAR = Cause(
    "logits masked by a grammar, a bias or banned words",
    "send one batch without guided decoding, logit_bias and bad_words",
)
PENALTY = Cause(
    "repetition penalty",
    "set repetition, presence and frequency penalty off; generation_config='vllm' keeps a model's"
    " own defaults out",
    ("token_ids",),
)
HIDDEN_SAMPLER = Cause(
    "raw log-probs reported by a tempered or truncated sampler",
    "look at the sampling parameters and the model's generation_config; set logprobs_mode to"
    " processed_logprobs (vLLM)",
)

# Weights.
NEVER_SYNCHRONISED = Cause(
    "weights never synchronised",
    "hash the engine's weights before and after an update; at learning rate 0 the mismatch must"
    " stay flat",
    ("step",),
)
SWALLOWED = Cause(
    "updates lost in the engine's number format",
    "score with the trainer's weights rounded to the engine's format: the mismatch must fall to"
    " that of arithmetic; float16 weights shorten it",
    ("step",),
)
STALE_WEIGHTS = Cause(
    "stale weights",
    "score the same tokens with the trainer's weights at the rollout's version; compare a hash of"
    " the weights on both sides",
    ("step", "version"),
)
QUANTISED = Cause(
    "quantised rollout", "serve the rollout in bfloat16, without FP8 or INT8 weights or KV cache",
)
ADAPTER = Cause(
    "an adapter not served or not merged",
    "train nothing and set the adapter to zero: the mismatch must vanish",
)
DEFINITION = Cause(
    "another model definition",
    "compare the configurations: norm epsilon, tied head, attention scale, biases, expert count",
)
STALE_CACHE = Cause(
    "stale prefix cache",
    "switch prefix caching off, or reset the cache after each weight update",
    ("group",),
)
SHARED_CACHE = Cause(
    "a cache of the shared system prompt that outlives the weights",
    "reset the prefix cache after each weight update, and send one batch with another system"
    " prompt",
)
ONE_ENGINE = Cause(
    "one engine or rank of many",
    "hash the weights of each engine after an update; send the same prompt to each",
    ("engine",),
)
VERSIONS_INSIDE = Cause(
    "weight versions inside an answer",
    "look for answers that were aborted and continued after an update; dump each token's version",
    ("version",),
)
BAD_BATCH = Cause(
    "a part of the batch from elsewhere",
    "dump the host, the rank and the time of each sequence, and compare the ones that stand apart",
    ("engine",),
)

# Arithmetic.
ROUTING = Cause(
    "heavy tail, as from MoE routing",
    "replay the engine's routing in the trainer, or compare both under one expert-parallel layout",
)
CORRUPTED = Cause(
    "values lost or overwritten on one side",
    "score the tokens named again on both sides, one sequence at a time",
)
HEAD_ENGINE = Cause(
    "16-bit LM head in the engine",
    "compute the logits in float32 on both sides; on one side alone it helps less",
)
HEAD_TRAINER = Cause(
    "16-bit LM head in the trainer",
    "compute the logits in float32 on both sides; on one side alone it helps less",
)
STORED = Cause(
    "log-probs stored in 16 bits", "keep them in float32 from the log-softmax on",
)
