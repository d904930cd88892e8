"""FP8 recipes: a name to derive from; FP8 is never switched on."""


class DelayedScaling:
    pass
