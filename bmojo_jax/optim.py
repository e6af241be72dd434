"""AdamW (arXiv 1711.05101) with global-norm clipping, a schedule and decay decided by rules.

    g  <- g * min(1, clip_norm / ||g||)
    m  <- beta1 m + (1 - beta1) g ;  v <- beta2 v + (1 - beta2) g^2
    p  <- p - rate * (m^ / (sqrt(v^) + eps) + weight_decay * p)        (m^, v^ without bias)

An update is linear in `rate`, so a sweep can treat the rate as data: scale the updates of a
transformation made with the peak rate 1.

Moments have the dtype of their parameters (float32).
"""

from typing import Any

import jax
import optax

from bmojo_jax import paths
from bmojo_jax.config import OptimConfig

# Which parameters decay; the first match wins. What decays is a matrix that mixes channels. The
# kernel of the depthwise convolution does not: its T taps are a gain of one channel, next to the
# decayed in_proj, and pulling them to zero would only switch the channel off.
DECAY_RULES: tuple[tuple[str, bool], ...] = (
    (r".*/(a_log|skip|eidetic_gate|bias|scale)", False),
    (r".*/conv/kernel", False),
    (r".*/(kernel|table)", True),
)


def decay_mask(params: Any) -> Any:
    """A tree of booleans like `params` (arrays or shapes): which parameters decay.

    Raises:
      ValueError: a parameter matches no rule.
    """
    return jax.tree_util.tree_map_with_path(
        lambda key_path, _: paths.first_match(DECAY_RULES, paths.path_of(key_path)), params
    )


def make_schedule(optim: OptimConfig, steps: int) -> optax.Schedule:
    """The learning rate as a function of the number of updates made so far.

    Update n (counted from 1) of the warm-up has the rate n / warmup_steps of the peak, so no
    update has rate 0; update `steps` has final_fraction of the peak.

    Raises:
      ValueError: warm-up and decay together are longer than the run.
    """
    peak, final = optim.learning_rate, optim.learning_rate * optim.final_fraction
    after = steps - optim.warmup_steps
    pieces = [(optax.linear_schedule(0.0, peak, max(optim.warmup_steps, 1)), optim.warmup_steps)]
    if optim.schedule == "warmup_cosine":
        cosine = optax.cosine_decay_schedule(peak, max(after, 1), alpha=optim.final_fraction)
        pieces.append((cosine, after))
    else:
        decay = round(optim.decay_fraction * steps)
        if decay > after:
            raise ValueError(
                f"optim.decay_fraction={optim.decay_fraction} must be at most "
                f"{max(after, 0) / steps:g}: what optim.warmup_steps={optim.warmup_steps} "
                f"leaves of {steps=}"
            )
        pieces.append((optax.constant_schedule(peak), after - decay))
        pieces.append((optax.linear_schedule(peak, final, max(decay, 1)), decay))
    pieces = [(schedule, length) for schedule, length in pieces if length > 0]
    ends, end = [], 0
    for _, length in pieces[:-1]:
        end += length
        ends.append(end)
    joined = optax.join_schedules([schedule for schedule, _ in pieces], ends)
    return lambda count: joined(count + 1)


def make_optimizer(
    optim: OptimConfig, steps: int, params_or_shapes: Any
) -> optax.GradientTransformation:
    """The optimizer of a run of `steps` updates. Gradients arrive already averaged.

    Raises:
      ValueError: a parameter matches no decay rule, or the schedule does not fit the run.
    """
    return optax.chain(
        optax.clip_by_global_norm(optim.clip_norm),
        optax.scale_by_adam(b1=optim.beta1, b2=optim.beta2, eps=optim.eps),
        optax.add_decayed_weights(optim.weight_decay, mask=decay_mask(params_or_shapes)),
        optax.scale_by_learning_rate(make_schedule(optim, steps)),
    )
