"""Mistakes that a kernel of csrc/ could have, each of a line or two; mutate_kernels.py shows that tests catch them."""

from __future__ import annotations

import functools
from dataclasses import dataclass


@dataclass(frozen=True)
class Mutation:
    """`old`, which is once in csrc/`file`, becomes `new`. same: why nothing that a test could see is changed by it."""

    name: str
    kernel: str
    file: str
    old: str
    new: str
    same: str = ""


attention = functools.partial(Mutation, kernel="attention", file="attention_kernel.h")
half = functools.partial(Mutation, kernel="attention", file="attention_half.h")
eight = functools.partial(Mutation, kernel="attention_eight", file="attention_eight.h")
bytes_of = functools.partial(Mutation, kernel="attention_eight", file="quantize.h")
ring = functools.partial(Mutation, kernel="attention", file="attention.h")
call = functools.partial(Mutation, kernel="attention", file="attention_call.h")
conv = functools.partial(Mutation, kernel="conv", file="conv_kernel.h")
step = functools.partial(Mutation, kernel="conv", file="conv.h")
shape = functools.partial(Mutation, kernel="conv", file="conv_call.h")
norm = functools.partial(Mutation, kernel="norm", file="vae_norm.h")


NO_EDGE = "nothing keeps the softmax before the wait for its step's product"


def exchanged(first: str, second: str) -> dict[str, str]:
    return {"old": first + second, "new": second + first}


MUTATIONS = (
    # Rings and barriers of attention
    ring("the ring's parity does not turn", old="{0, parity ^ 1}", new="{0, parity}"),
    attention(
        "first keys are handed back while they are read",
        **exchanged("hw.template drain<0>(state.scored());\n", "    hw.release(barrier_of(kKeyEmpty, ring.stage));\n"),
    ),
    attention(
        "keys are handed back while they are read",
        **exchanged(
            "hw.template drain<1>(state.scored());\n", "        hw.release(barrier_of(kKeyEmpty, next.stage));\n"
        ),
    ),
    attention(
        "keys of the step before are handed back",
        old="hw.release(barrier_of(kKeyEmpty, next.stage));",
        new="hw.release(barrier_of(kKeyEmpty, ring.stage));",
    ),
    attention(
        "values are handed back while they are read",
        **exchanged(
            "hw.template drain<0>(state.weighed());\n", "        hw.release(barrier_of(kValueEmpty, ring.stage));\n"
        ),
    ),
    attention(
        "last values are handed back while they are read",
        **exchanged(
            "hw.template drain<0>(state.weighed());\n", "    hw.release(barrier_of(kValueEmpty, ring.stage));\n"
        ),
    ),
    attention(
        "queries of one step are not handed back",
        old="if (walk.steps == 1) hw.arrive(barrier_of(kQueryEmpty));",
        new="",
    ),
    attention(
        "queries are handed back in the first step",
        old="if (step + 1 == walk.steps) hw",
        new="if (step == 1) hw",
    ),
    attention(
        "queries are overwritten without a wait",
        old="        hw.wait(barrier_of(kQueryEmpty), parity ^ 1);\n",
        new="",
    ),
    attention(
        "keys are overwritten a round early",
        old="hw.wait(barrier_of(kKeyEmpty, ring.stage), ring.parity ^ 1);",
        new="hw.wait(barrier_of(kKeyEmpty, ring.stage), 1);",
    ),
    attention(
        "queries of the work before are taken",
        old="hw.wait(barrier_of(kQueryFull), parity);\n            parity ^= 1;",
        new="hw.wait(barrier_of(kQueryFull), parity);",
    ),
    attention(
        "keys are not waited for",
        old="        hw.wait(barrier_of(kKeyFull, next.stage), next.parity);\n",
        new="",
    ),
    attention(
        "values are not waited for",
        old="""\
        hw.wait(barrier_of(kValueFull, ring.stage), ring.parity);
        hw.wait""",
        new="        hw.wait",
    ),
    attention(
        "values of the next step are waited for again",
        old="hw.again(barrier_of(kValueFull, ring.stage), ring.parity)",
        new="hw.again(barrier_of(kValueFull, next.stage), next.parity)",
    ),
    attention(
        "values are waited for again where they are handed back",
        old="""\
        hw.release(barrier_of(kValueEmpty, ring.stage));
        Form::settle(hw, state);
""",
        new="""\
        hw.release(barrier_of(kValueEmpty, ring.stage));
        hw.again(barrier_of(kValueFull, ring.stage), ring.parity);
        Form::settle(hw, state);
""",
    ),
    attention(
        NO_EDGE,
        old="        hw.again(barrier_of(kValueFull, ring.stage), ring.parity);  // so the softmax stays above\n",
        new="",
        same="slower: the result is the same; test_machine_code.py sees it in the machine code",
    ),
    half(
        "a barrier expects one panel less",
        old="hw.expect(barrier, D / kColumns * bytes);",
        new="hw.expect(barrier, (D / kColumns - 1) * bytes);",
    ),
    attention(
        "a tile without keys has its queries loaded",
        old="if (walk.steps > 0) {\n            hw.wait(barrier_of(kQueryEmpty)",
        new="if (true) {\n            hw.wait(barrier_of(kQueryEmpty)",
    ),
    # Pairs of blocks
    half("both blocks load the first half", old="hw.rank() * (Keys / Blocks)", new="0 * (Keys / Blocks)"),
    half("halves lie in the same place", old="to + first * kRow,", new="to,"),
    half("the second half is of the first keys", old="row + first,", new="row,"),
    half("a block alone gets its half", old="hw.share(tensor,", new="hw.load(tensor,"),
    ring("a stage is free when one of two blocks has read it", old="kWarps * blocks : kWarps", new="kWarps : kWarps"),
    attention(
        "the other block is not told of keys that are read",
        old="hw.release(barrier_of(kKeyEmpty, next.stage));",
        new="hw.arrive(barrier_of(kKeyEmpty, next.stage));",
    ),
    # Numbers of works
    attention(
        "a number is told before the last one is heard",
        old="            hw.wait(barrier_of(kWorkEmpty), told ^ 1);\n",
        new="",
    ),
    attention("numbers are told in one parity", old="            told ^= 1;\n", new=""),
    attention("numbers are heard in one parity", old="            heard ^= 1;\n", new=""),
    attention("what was heard is not handed back", old="            hw.arrive(barrier_of(kWorkEmpty));\n", new=""),
    attention("the counter gives first works again", old="? every + hw.next(s.given)", new="? hw.next(s.given)"),
    attention(
        "the end is not told",
        old="        if (Form::kCounted && s.given) {\n            hw.wait(barrier_of(kWorkEmpty)",
        new="        if (Form::kCounted && s.given && number < end) {\n            hw.wait(barrier_of(kWorkEmpty)",
    ),
    # Turns
    attention(
        "the turn is passed on before it has come",
        old="""\
        hw.turn(group);
        Form::score(hw, state, group, next.stage);
        Form::weigh(hw, state, ring.stage);
        hw.pass(group);
""",
        new="""\
        hw.pass(group);
        Form::score(hw, state, group, next.stage);
        Form::weigh(hw, state, ring.stage);
        hw.turn(group);
""",
    ),
    attention("the last turn is left over", old="    if (group == 0) hw.turn(group);\n", new=""),
    # Products and their registers
    half("panels overlap", old="at + panel * bytes,", new="at + panel * bytes / 2,"),
    half("keys have panels of queries", old="keys + panel * kPanel +", new="keys + panel * kQueryPanel +"),
    half("queries have panels of keys", old="queries + panel * kQueryPanel +", new="queries + panel * kPanel +"),
    half("values have panels of queries", old="* kRow, kPanel)", new="* kRow, kQueryPanel)"),
    half("queries are loaded as keys are", old="tensor == kQuery ? kQueryPanel : kPanel", new="kPanel"),
    half("weights of the last sixteen keys are left out", old="k < Keys / kDepth", new="k < Keys / kDepth - 1"),
    half(
        "a step along K is half as wide",
        old="k * kDepth % kColumns * kBytes;",
        new="k * kDepth % kColumns;",
    ),
    half("values are a row, not sixteen, further", old="k * kDepth * kRow", new="k * kRow"),
    half("a group reads the other's queries", old="address(group * (", new="address((group ^ 1) * ("),
    half("scores of later columns replace", old="scores<true>", new="scores<false>"),
    half("no fence before scores", old="        hw.begin(state.scores);\n", new=""),
    half("no fence before weights", old="        hw.begin(state.weights);\n", new=""),
    half("no fence before output", old="        hw.begin(state.output);\n", new=""),
    attention(
        "output shrinks while it is added to",
        old="""\
        hw.template drain<0>(state.weighed());
        hw.release(barrier_of(kValueEmpty, ring.stage));
        Form::settle(hw, state);
""",
        new="""\
        Form::settle(hw, state);
        hw.template drain<0>(state.weighed());
        hw.release(barrier_of(kValueEmpty, ring.stage));
""",
    ),
    attention(
        "weights are replaced while they are read",
        old="""\
        hw.template drain<0>(state.weighed());
        hw.release(barrier_of(kValueEmpty, ring.stage));
        Form::settle(hw, state);
        Form::round(hw, state);
""",
        new="""\
        Form::round(hw, state);
        hw.template drain<0>(state.weighed());
        hw.release(barrier_of(kValueEmpty, ring.stage));
        Form::settle(hw, state);
""",
    ),
    attention(
        "the product of a step is not waited for",
        old="hw.template drain<0>(state.weighed());\n        hw",
        new="hw.template drain<1>(state.weighed());\n        hw",
    ),
    attention(
        "scores wait for the output",
        old="drain<1>(state.scored())",
        new="drain<0>(state.scored())",
        same="slower: products of values no longer run beside the softmax, the result is the same",
    ),
    Mutation(
        "a second row is 4 below",
        kernel="attention",
        file="sm90_layout.h",
        old="half * 8;",
        new="half * 4;",
    ),
    Mutation(
        "columns of the first panel twice",
        kernel="attention",
        file="sm90_layout.h",
        old="uint64_t{panel >> 4} << 16",
        new="uint64_t{0} << 16",
    ),
    # Sums
    attention("a key too many", old="+ i % 2 >= count", new="+ i % 2 > count"),
    attention("highest of some scores", old="hw.max(most[2], most[3])", new="most[2]"),
    half("highest of a thread alone", old="        hw.quad_max(found);\n", new=""),
    attention("sums of a thread alone", old="    hw.quad_sum(state.total);\n", new=""),
    half("sums do not shrink", old="* state.shrink.at(thread, half) + sum", new="+ sum"),
    half("lse without scale", old="return highest * s.scale;", new="return highest;"),
    attention("a query too many is stored", old="query >= work.end", new="query > work.end"),
    # Works
    ring("parts begin behind the whole blocks", old="walk.part + step - walk.fulls]", new="walk.part + step]"),
    ring("a tail is a whole step", old="return s.keys - step * keys;", new="return keys;"),
    ring("lists of another tile", old="* s.tiles + tile;", new="* s.tiles + part;"),
    ring("whole blocks of a tile too many", old="row + 1] - walk.full)", new="row + 1] - walk.full + 1)"),
    ring(
        "works in another order",
        old="part = take(number, s.parts), tile = take(number, s.tiles);",
        new="tile = take(number, s.tiles), part = take(number, s.parts);",
        same="every work is still made once; blocks that follow one another no longer read the same keys",
    ),
    call(
        "tokens and heads change places",
        old="{strides[1], strides[2], strides[0]}",
        new="{strides[2], strides[1], strides[0]}",
    ),
    call("powers of two are taken for those of e", old="scale * 1.44269504088896341f", new="scale"),
    # 8-bit values
    eight("keys in the order of 16-bit registers", old="slot / 16 * 16 + slot % 4 / 2 * 8 +", new="slot / 16 * 16 +"),
    eight("values begin at another block", old="return row / kKeys * D;", new="return row / kKeys * kKeys;"),
    eight("scales of another block", old="first_key(s, walk, step, kKeys) / kKeys;", new="step;"),
    eight("scales of another head", old="s.scales.queries + head_of(s, work) * s.queries", new="s.scales.queries"),
    eight("exponents count from 0", old="state.up = exponent - state.unit + kUp;", new="state.up = exponent + kUp;"),
    eight("the output keeps the unit of the step before", old="shrink * state.rebase;", new="shrink;"),
    eight(
        "the unit is that of the largest values",
        old="state.unit = hw.max(exponent, state.most - kBelow);",
        new="state.unit = state.most;",
    ),
    eight("weights are not raised", old="base = most - up;", new="base = most;"),
    eight("sums stay raised", old="shrink + sum * down;", new="shrink + sum;"),
    eight("steps along K are half as wide", old="queries + k * kDepth8)", new="queries + k * kDepth8 / 2)"),
    eight(
        "products of a step are added to those before", old="values<false>(state.part", new="values<true>(state.part"
    ),
    eight("no fence before the part", old="        hw.begin(state.part);\n", new=""),
    eight("no fence before weights of 8 bits", old="        hw.begin(state.weights);\n", new=""),
    eight(
        "the output shrinks a step early",
        old="state.shrink.at(thread, i / 2 % 2) +",
        new="state.next.at(thread, i / 2 % 2) +",
    ),
    eight("the last part is left out", old="state.shrink.at(thread, i / 2 % 2) + state.part.at(thread, i);", new="1;"),
    eight("registers of weights in another order", old="i % 4 / 2 * 8 + i % 2 * 2;", new="i % 2 * 8 + i % 4 / 2 * 2;"),
    eight(
        "highest of 8-bit scores without the step's scale",
        old="found.at(thread, half) * scale);",
        new="found.at(thread, half));",
    ),
    eight("lse without what keys have in common", old="? highest + s.scales.shifts[query] * s.scale", new="? highest"),
    eight("the output keeps the exponent", old="- kUp);\n    }\n", new=");\n    }\n"),
    Mutation(
        "rows of 64 bytes as far apart as those of 128",
        kernel="attention_eight",
        file="sm90_layout.h",
        old="uint64_t{8 * Row / 16} << 32",
        new="uint64_t{8 * kRow / 16} << 32",
    ),
    Mutation(
        "values have as many rows as there are keys",
        kernel="attention_eight",
        file="attention_eight_call.h",
        old="at.scales.count * call.head_dim, kKeys",
        new="at.scales.count * kKeys, kKeys",
    ),
    bytes_of(
        "a tile begins where the last one ends",
        old="block_of(const Call& s, int64_t index) {\n    Block made;\n",
        new="block_of(const Call& s, int64_t index) {\n    Block made;\n    if (s.tiles) index = index / 2 * 2;\n",
    ),
    bytes_of("keys beyond a tile are taken", old="if (token >= block.count) return made;", new=""),
    bytes_of("the mean stays", old="made.at[i] -= mean[block.head * s.head_dim + column + i];", new="made.at[i] -= 0;"),
    bytes_of(
        "the mean of another head",
        old="made.at[i] -= mean[block.head * s.head_dim",
        new="made.at[i] -= mean[0 * s.head_dim",
    ),
    bytes_of("exponents one too low", old="(part <= 0.875f ? 9 : 8)", new="9"),
    bytes_of("what is not finite is hidden", old="return a >= b || a != a ? a : b;", new="return a >= b ? a : b;"),
    bytes_of("scales are of seven bits less one", old="kMostInt8 = 127", new="kMostInt8 = 126"),
    bytes_of("a scale for its inverse", old="return limit / (most", new="return 1 / limit * (most"),
    # The convolution
    step("the parity of rings does not turn", old="            parity ^= 1;\n", new=""),
    conv(
        "a stage is handed back while it is read",
        **exchanged(
            "multiply<Depth>(hw, state, pixels, j * s.box_w + k, weights);\n",
            "            hw.release(kWeightRing, rings.weights);\n",
        ),
    ),
    conv(
        "another box is handed back",
        **exchanged("        hw.release(kPixelRing, rings.pixels);\n", "        rings.pixels.next(pixel_stages(s));\n"),
    ),
    conv("the last product is not waited for", old="drain<0>(state.sums)", new="drain<1>(state.sums)"),
    conv("weights are not waited for", old="            hw.wait_full(kWeightRing, rings.weights);\n", new=""),
    conv(
        "pixels are not waited for",
        old="        hw.wait_full(kPixelRing, rings.pixels);\n        switch",
        new="        switch",
    ),
    conv("weights are overwritten", old="            hw.wait_empty(kWeightRing, rings.weights);\n", new=""),
    conv(
        "pixels are overwritten",
        old="hw.wait_empty(kPixelRing, rings.pixels);\n        hw.expect(kPixelRing, rings.pixels, box",
        new="hw.expect(kPixelRing, rings.pixels, box",
    ),
    conv(
        "panels come before the stage is read",
        old="        hw.wait_empty(kPixelRing, rings.pixels);\n        hw.expect(kPixelRing, rings.pixels, K",
        new="        hw.expect(kPixelRing, rings.pixels, K",
    ),
    conv(
        "fewer bytes of pixels are expected",
        old="rings.pixels, box_bytes(s))",
        new="rings.pixels, box_bytes(s) - kRow)",
    ),
    conv("fewer bytes of panels are expected", old="? many * kPanelBytes : 0", new="? kPanelBytes : 0"),
    conv("no fence before sums", old="    hw.begin(state.sums);\n", new=""),
    conv("no fence before the left matrix", old="    hw.begin(state.left);\n", new=""),
    conv(
        "steps of weights are half as wide",
        old="descriptor(weights + k * kDepth * kBytes)",
        new="descriptor(weights + k * kDepth)",
    ),
    conv("rows of a box are as long as those of a tile", old="j * s.box_w + k", new="j * s.tile_w + k"),
    step(
        "the first row of a box is that of a tile", old="pixel / s.tile_w * s.box_w", new="pixel / s.tile_w * s.tile_w"
    ),
    step("all groups have the same pixels", old="return group * kGroupPixels +", new="return 0 * group +"),
    step("a warp's pixels are those of the first", old="thread / 32 * 16 + thread % 16;", new="thread % 16;"),
    step("the second eight channels are the first", old="row * kRow + thread % 32 / 16 * 16", new="row * kRow"),
    step("panels are not swizzled", old="return at ^ (at >> 7 & 3) << 4;", new="return at;"),
    conv("weights of the first place", old="tile.place * s.outputs + tile.n", new="tile.n"),
    conv("weights of the first tap", old="box.c, box.tap + tap,", new="box.c, box.tap,"),
    conv("sums go on from tile to tile", old="        begin_sums<N>(hw, state, s, tile, bias);\n", new=""),
    conv("every bias is the first", old="(bias + n), first, second)", new="(bias), first, second)"),
    conv("a panel is stored before it is shown", old="        hw.show_words(group);\n", new=""),
    conv("panels are handed back while they are stored", old="    hw.wait_stored();", new="    //"),
    conv(
        "panels are written unless they are waited for",
        old="        hw.wait_full(kPixelRing, rings.pixels);\n        const uint32_t to",
        new="        const uint32_t to",
    ),
    conv("what is there is not added", old="hw.pack(x + a, y + b)", new="hw.pack(x, y)"),
    conv(
        "what is there comes from the first panel",
        old="tile.n + (first + panel) * kPanel",
        new="tile.n + panel * kPanel",
    ),
    conv(
        "what is there comes from the first rows",
        old="tile.h + group * (kGroupPixels / s.tile_w), tile.t, tile.b);",
        new="tile.h, tile.t, tile.b);",
    ),
    conv(
        "rows of all groups are the first",
        old="const int h = tile.h + group * (kGroupPixels / s.tile_w), half",
        new="const int h = tile.h, half",
    ),
    conv("a part of another group is stored", old="from + group * (kGroupPixels * kPanelRow)", new="from"),
    conv("places are stored in the first", old="hw.store_box(tile.place, part,", new="hw.store_box(0, part,"),
    conv(
        "the second half goes where the first does",
        old="hw.store_box(1, part, n - half,",
        new="hw.store_box(1, part, n,",
    ),
    conv("a panel of both halves goes to the first", old="if (n + kPanel > half)", new="if (n >= half)"),
    step(
        "channels of half a sixteen are left out",
        old="left = divide_up(s.channels - number / parts(s) % chunks(s) * kChannels, kDepth)",
        new="left = (s.channels - number / parts(s) % chunks(s) * kChannels) / kDepth",
    ),
    step("a frame too many is left out", old="? 0 : -t0 *", new="? 0 : (1 - t0) *"),
    step("the past is read from its end", old="t < 0 ? t + s.history : t", new="t < 0 ? -t : t"),
    shape("a box has no border below", old="s.box_h = whole ? h : tile_h(s);", new="s.box_h = tile_h(s);"),
    shape("steps in space have one box", old="whole = s.stride == 1 &&", new="whole ="),
    shape(
        "every row is read where each second one is meant", old="map.every[1] = map.every[2] =", new="map.every[1] ="
    ),
    shape(
        "places begin at the first", old="which / 2 * strides[2] + which % 2 * strides[3]", new="which % 2 * strides[3]"
    ),
    step(
        "all taps have four products",
        old="return left < kChannels / kDepth ? left : kChannels / kDepth;",
        new="return kChannels / kDepth + 0 * left;",
        same="slower: channels beyond the last are zeros in both matrices",
    ),
    # The norm before it
    norm(
        "vectors beyond the last are stored",
        old="if (at < s.vectors) reinterpret_cast<Vector*>(to)",
        new="reinterpret_cast<Vector*>(to)",
    ),
    norm("vectors beyond the last are read", old="if (inside && at < s.vectors)", new="if (inside)"),
    norm(
        "lanes lie as far apart as vectors",
        old="first + (i << s.log_lanes) + lane;\n        if (inside",
        new="first + i + lane;\n        if (inside",
    ),
    norm("dimensions merge by the strides of x alone", old=" && norm.out[i] == s.size[at] * s.out[at];", new=";"),
    norm("pixels of one distance, whatever lies before", old="s.flat = at >= 3;", new="s.flat = 1;"),
    norm("offsets of 32 bits", old="int64_t{pixel} * s.x[3]", new="static_cast<int>(pixel * s.x[3])"),
    norm(
        "a place has the stride before its own",
        old="made.out += place * s.out[i];",
        new="made.out += place * s.out[i - 1];",
    ),
    norm("a sum of half the channels", old="        squares[1] += b * b;\n", new=""),
    norm("no mean", old="fmaxf(squares, 1e-24f) * s.each", new="fmaxf(squares, 1e-24f)"),
    norm("a pixel of zeros divides by zero", old="fmaxf(squares, 1e-24f)", new="squares"),
    norm("an exponent to another base", old="-1.44269504f", new="-1.4427f"),
    norm(
        "wide pixels with the first factors throughout",
        old="load<Many>(s, gamma, lane, first, true)",
        new="load<Many>(s, gamma, lane, 0, true)",
    ),
    norm("pixels beyond 32 bits are counted in them", old=" || s.pixels >= kNear", new=""),
)


def mutate(text: str, mutation: Mutation) -> str:
    """Raises ValueError if what is to be replaced is not there once."""
    if text.count(mutation.old) != 1:
        raise ValueError(f"{mutation.name!r}: {mutation.old!r} is {text.count(mutation.old)} times in {mutation.file}")
    return text.replace(mutation.old, mutation.new)
