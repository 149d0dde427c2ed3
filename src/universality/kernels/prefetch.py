"""A hint to the processor to bring memory near before it is needed, for kernels that read in an order of their own."""

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

_READ, _ALL_LEVELS, _DATA = 0, 3, 1


@intrinsic
def prefetch(typing_context, array, index):
    """Ask for the cache line of `array[index]`, a contiguous array of one dimension; changes nothing."""
    signature = types.void(array, index)

    def generate(context, builder, signature, arguments):
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        byte, word = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte, word, word, word])
        hint = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
        place = builder.bitcast(builder.gep(data, [arguments[1]]), byte)
        builder.call(hint, [place, word(_READ), word(_ALL_LEVELS), word(_DATA)])
        return context.get_dummy_value()

    return signature, generate
