"""Notes at the start of a run about settings that may be mistakes."""

from __future__ import annotations

from vit_static.config.optim_schema import OptimConfig
from vit_static.config.schema import Config

_MAX_SHARE = 0.05
_SUITABLE_SHARE_OF_STEPS = 10  # the time constant of a suitable average is this part of the run


def config_notes(config: Config, num_steps: int) -> list[str]:
    """Return a line for each setting that may be a mistake in a run of this length."""
    notes = [late_average(config, num_steps), _last_image_size(config)]
    return [note for note in notes if note is not None]


def late_average(config: Config, num_steps: int) -> str | None:
    """Return why the moving average of the weights hasn't caught up with them at the end of the run, and the remedy."""
    optim = config.optim
    share = _first_weights_share(optim, num_steps)
    if share <= _MAX_SHARE:
        return None
    suitable = max(1.0 - _SUITABLE_SHARE_OF_STEPS / num_steps, 0.5)
    return (
        f"optim.ema_decay = {optim.ema_decay:g}: the moving average of the weights has a time constant of "
        f"{1.0 / (1.0 - optim.ema_decay):,.0f} steps, and the run has {num_steps:,}: {100 * share:.0f} % of the last "
        f"average are the weights after the first step; set optim.ema_decay={suitable:.3g}, or optim.ema_warmup=true"
    )


def _last_image_size(config: Config) -> str | None:
    sizes, own = config.train.sizes, config.model.image_size
    if not sizes or sizes[-1] == own:
        return None
    return (
        f"train.image_sizes: the run ends with images of {sizes[-1][0]}x{sizes[-1][1]}; evaluations and exports have "
        f"model.image_size, {own[0]}x{own[1]}"
    )


def _first_weights_share(optim: OptimConfig, num_steps: int) -> float:
    """Return the share of the weights after the first step in the average after `num_steps` updates.

    0 without an average, and with warmup, whose decays begin small enough.
    """
    if optim.ema_decay == 0.0 or optim.ema_warmup:
        return 0.0
    return float(optim.ema_decay ** max(num_steps - 1, 0))
