"""The parsers of the commands that make no video: inspect, models, download, convert, tune, doctor and bench."""

from __future__ import annotations

from fastvid.cli.command_parser import EPILOG, Parser, add_files


def inspect() -> Parser:
    parser = Parser(
        prog="fastvid inspect",
        description="Describe a model from its configurations and file headers, without loading it; or a video or "
        "picture, with the recipe in it.",
        epilog=f"examples:\n  fastvid inspect embedded\n  fastvid inspect out.mp4\n\n{EPILOG}",
    )
    parser.add_argument(
        "model", help="embedded, a name (`fastvid models`), a folder, a file, or a hub id; or a video or picture"
    )
    add_files(parser)
    parser.add_output_flags(quiet=False)
    return parser


def models() -> Parser:
    parser = Parser(
        prog="fastvid models",
        description="List the models that are known by name: their size, the GPU memory that their default video "
        "takes, their licence, and where they are published.\n\nA name is taken wherever a model is: --model NAME.",
        epilog=f"examples:\n  fastvid models\n  fastvid models --json\n  fastvid download wan2.1-t2v-1.3b\n\n{EPILOG}",
    )
    parser.add_output_flags(quiet=False)
    return parser


def download() -> Parser:
    parser = Parser(
        prog="fastvid download",
        description="Bring a model from the hub into the local cache, without loading it: only the files that fastvid "
        "reads, each compared with the size and digest that the hub lists. Prints where it is.\n\nA damaged file of "
        "the cache is fetched again. HF_HOME names the folder of the cache, HF_TOKEN or `hf auth login` the login.",
        epilog="examples:\n"
        "  fastvid download wan2.1-t2v-1.3b\n"
        "  fastvid download Wan-AI/Wan2.1-T2V-1.3B-Diffusers\n"
        "  fastvid download wan2.1-t2v-1.3b --quantize fp8\n"
        "  fastvid download Comfy-Org/Wan_2.1_ComfyUI_repackaged/split_files/vae/wan_2.1_vae.safetensors\n\n"
        f"{EPILOG}",
    )
    parser.add_argument(
        "model",
        help="a name (`fastvid models` lists them), a hub id (org/name), or a file of a repository "
        "(org/name/FILE.safetensors)",
    )
    parser.add_argument(
        "--quantize",
        metavar="NAME",
        help="also make a copy in 8 bits, as convert does: fp8 or int8, or for each part; --model NAME --quantize NAME "
        "takes it from then on",
    )
    parser.add_argument(
        "-o",
        "--output",
        metavar="PATH",
        help="where that copy goes (default: fastvid's folder of the user's cache; of a file, a file here)",
    )
    parser.add_output_flags()
    return parser


def convert() -> Parser:
    parser = Parser(
        prog="fastvid convert",
        description="Convert a model, or one part of it, between diffusers' and the original layout, bit for bit; "
        "or to another dtype, or 8 bits.\n\n"
        "Pickles (.pth, .pt, .bin, .ckpt) are opened in a child process that accepts nothing but tensors.",
        epilog="examples:\n"
        "  fastvid convert Wan2.1-T2V-1.3B wan-diffusers                (a whole folder)\n"
        "  fastvid convert wan-diffusers wan-original --to original\n"
        "  fastvid convert wan2.1_t2v_1.3B_bf16.safetensors transformer  (ComfyUI's single file)\n"
        "  fastvid convert Wan2.1_VAE.pth vae\n"
        "  fastvid convert wan2.1-t2v-14b-Q8_0.gguf transformer --dtype bf16\n"
        "  fastvid convert wan-diffusers wan-fp8 --quantize fp8\n"
        "  fastvid convert self_forcing_dmd.pt self-forcing --base Wan2.1-T2V-1.3B-Diffusers  (a whole folder)\n"
        f"  fastvid convert longlive_lora.pt longlive_lora.safetensors\n\n{EPILOG}",
    )
    parser.add_argument(
        "source", metavar="SRC", help="a model folder in either layout, or a file or folder of one part"
    )
    parser.add_argument("destination", metavar="DST", help="a new folder, or for one part a new .safetensors file")
    parser.add_argument("--to", default="diffusers", metavar="LAYOUT", help="diffusers (default) or original")
    parser.add_argument(
        "--base", metavar="FOLDER", help="a model folder that supplies everything but the transformer in SRC"
    )
    parser.add_argument(
        "--key",
        metavar="NAME",
        help="which entry of a training checkpoint holds the weights (default: generator_ema, then generator, ...)",
    )
    parser.add_argument(
        "--dtype", metavar="NAME", help="fp32, bf16 or fp16; also of quantized weights (default: as is)"
    )
    parser.add_argument(
        "--quantize",
        metavar="NAME",
        help="write linear layers in 8 bits, in ComfyUI's format: fp8 or int8, or for each part, such as "
        "transformer=fp8,text_encoder=int8 (default: as is)",
    )
    parser.add_output_flags(" about what was written")
    return parser


def tune() -> Parser:
    parser = Parser(
        prog="fastvid tune",
        usage="fastvid tune [flags]",
        description="Check and time every back end of every operation on this machine, for the shapes of a model, and\n"
        "keep in the user's cache which was right and fastest. `auto` goes by it from then on.\n\nA kernel that is "
        "wrong, hangs or crashes is reported and never chosen. Ctrl-C keeps what is done.",
        epilog="examples:\n"
        "  fastvid tune\n"
        "  fastvid tune --model Wan2.1-T2V-14B-Diffusers --size 1280x720 --budget 300\n"
        "  fastvid tune --model wan2.1-t2v-1.3b --only attention,linears   (no files needed)\n"
        f"  fastvid tune --show\n\n{EPILOG}",
    )
    add = parser.add_argument
    add("--model", metavar="MODEL", help="as for generate, or a published model by name, such as wan2.1-t2v-14b")
    add("--size", metavar="WxH", help="the video's size in pixels (default: the model's)")
    add("--num-frames", "--frames", metavar="N", help="the video's frames (default: the model's)")
    add("--budget", metavar="SECONDS", help="time for each model (default: 120 on a GPU, 60 on a CPU)")
    add("--device", metavar="NAME", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    add("--dtype", metavar="NAME", help="fp32, bf16, fp16 (default: bf16 on a GPU, fp32 on a CPU)")
    add(
        "--only",
        metavar="FAMILY[,...]",
        help="attention, linears, norms, ends, solver, rgb, vae-convolutions, vae-norms",
    )
    add("--export", metavar="FILE", help="write the result as JSON as well")
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--show", action="store_true", help="show what the table holds, and tune nothing")
    group.add_argument("--clear", action="store_true", help="remove the tables of all devices, and tune nothing")
    parser.add_output_flags()
    return parser


def doctor() -> Parser:
    parser = Parser(
        prog="fastvid doctor",
        description="Show this machine's hardware and software, and the back end of every operation.",
        epilog=f"example:\n  fastvid doctor --json\n\n{EPILOG}",
    )
    parser.add_argument(
        "--device", metavar="NAME", help="the device to choose back ends for (default: a GPU if there is one)"
    )
    parser.add_output_flags(quiet=False)
    return parser


def bench() -> Parser:
    parser = Parser(
        prog="fastvid bench",
        usage="fastvid bench [NAME ...] [--out FOLDER] [-- FLAGS OF THE SCRIPT]",
        description="Run benchmarks of operations and models on this machine; without a name, list them.",
        epilog="examples:\n  fastvid bench rgb attention --out results\n"
        f"  fastvid bench rgb -- --device cpu --rounds 5\n  fastvid bench rgb -- --help\n\n{EPILOG}",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="a benchmark")
    parser.add_argument("--out", metavar="FOLDER", default=".", help="where results go, as JSON (default: here)")
    return parser
