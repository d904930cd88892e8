"""The numbers of a model's MoE layers: one count for the decoder and for multi-token prediction.

Megatron counts the decoder's layers from 1, and those of multi-token prediction (MTP) from 1 again.
Maps, loads, tables and ``--laep-alpha`` need one number for each: the MTP layers come after the
decoder's, in the order in which the model runs them. In a model of 24 layers, the first MTP layer is
layer 25. A hybrid stack counts all its layers, whatever they are; its MTP modules are patterns of
several layers, which are counted through.

==================================== ================= ============================================
layer                                number            key in a checkpoint
==================================== ================= ============================================
decoder, GPT or hybrid               n                 decoder.layers.<n - 1>.
MTP d of a GPT                       L + d             mtp.layers.<d - 1>.transformer_layer.
layer i of MTP d in a hybrid stack   L + (d - 1) P + i mtp.layers.<d - 1>.mtp_model_layer.layers.<i - 1>.
==================================== ================= ============================================

L: layers of the decoder; P: layers in a hybrid pattern's MTP part. With ``--mtp-use-repeated-layer``
there is one MTP module, which counts the tokens of every depth that it is used for.
"""

from argparse import Namespace

_MOE = "E"  # in the pattern of a hybrid stack


def moe_layer_numbers(args: Namespace) -> list[int]:
    """The numbers of the layers that have experts, ascending.

    Args:
        args: Megatron's arguments after its own validation.
    """
    if args.hybrid_layer_pattern is not None:
        decoder, mtp = _hybrid(args)
        has_experts = [letter == _MOE for letter in decoder + mtp * _mtp_modules(args)]
    else:
        has_experts = _frequency(args)
        # Megatron takes the last layer of the decoder for the model of an MTP layer.
        has_experts = has_experts + has_experts[-1:] * _mtp_modules(args)
    return [index + 1 for index, found in enumerate(has_experts) if found]


def total_layers(args: Namespace) -> int:
    """How many layers the numbers count."""
    modules = _mtp_modules(args)
    if args.hybrid_layer_pattern is None:
        return args.num_layers + modules
    decoder, mtp = _hybrid(args)
    return len(decoder) + len(mtp) * modules


def mtp_names(args: Namespace) -> dict[int, str]:
    """What the MTP layers with experts are called, by number: ``mtp 1``; ``mtp 1.2`` for the second
    layer of the first module of a hybrid stack."""
    after = args.num_layers
    length = 1 if args.hybrid_layer_pattern is None else len(_hybrid(args)[1])
    names = {}
    for number in moe_layer_numbers(args):
        if number > after:
            names[number] = mtp_name(number - after, length)
    return names


def mtp_name(place: int, length: int) -> str:
    """The name of the MTP layer in a place, counted from 1, if a module has ``length`` layers."""
    module, index = divmod(place - 1, length)
    return f"mtp {module + 1}" + (f".{index + 1}" if length > 1 else "")


def _mtp_modules(args: Namespace) -> int:
    if not args.mtp_num_layers:
        return 0
    return 1 if args.mtp_use_repeated_layer else args.mtp_num_layers


def _frequency(args: Namespace) -> list[bool]:
    pattern = args.moe_layer_freq
    if isinstance(pattern, int):
        return [index % pattern == 0 for index in range(args.num_layers)]
    return [bool(has_experts) for has_experts in pattern]


def _hybrid(args: Namespace) -> tuple[str, str]:
    """One letter for each layer of the decoder, and of an MTP module."""
    # "stage|stage/module/module", the modules alike: Megatron has parsed it when it validated.
    decoder, *modules = args.hybrid_layer_pattern.split("/")
    return decoder.replace("|", ""), modules[0] if modules else ""
