"""A hint to the processor to bring memory near before it is needed, for kernels that read in an order of their own."""

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

_READ, _DATA = 0, 1
_ONCE, _ALL_LEVELS = 0, 3  # how long it is to stay: llvm's locality


def _hint(array, index, locality: int):
    signature = types.void(array, index)

    def generate(context, builder, signature, arguments):
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        byte, word = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte, word, word, word])
        hint = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
        place = builder.bitcast(builder.gep(data, [arguments[1]]), byte)
        builder.call(hint, [place, word(_READ), word(locality), word(_DATA)])
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def prefetch(typing_context, array, index):
    """Ask for the cache line of `array[index]`, a contiguous array of one dimension; changes nothing."""
    return _hint(array, index, _ALL_LEVELS)


@intrinsic
def prefetch_once(typing_context, array, index):
    """The same of a line that is read once: it is not to push others out of the larger caches."""
    return _hint(array, index, _ONCE)
