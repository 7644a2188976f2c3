"""Made-up photographs and a set of LLaVA-mix-665K's size; `python -m benchmarks._data_open PATH`: what opening it takes."""

import io
import json
import pickle
import random
import sys
import time

RECORDS = 665_298
MODES = ("indented list", "list on one line", "lines")


def made_record(rng, words, number):
    """One of about 1,500 bytes: mostly several turns, some of only text, with quotes, escapes and letters beyond ASCII."""
    conversations = []
    for turn in range(rng.choice((2, 3, 5, 6))):
        question = " ".join(rng.choices(words, k=rng.randint(6, 16)))
        mark = "<image>\n" if turn == 0 and number % 16 else ""
        conversations.append({"from": "human", "value": mark + question + "?"})
        conversations.append({"from": "gpt", "value": " ".join(rng.choices(words, k=rng.randint(2, 64)))})
    image = {"image": f"coco/train2017/{number:012d}.jpg"} if number % 16 else {}
    return {"id": f"{number:012d}", **image, "conversations": conversations}


def made_records(count, seed=0):
    """That many records of words that nobody knows."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) for _ in range(5000)]
    words += ["it\u2019s", "caf\u00e9", '"so"', "a\\b", "\u6f22\u5b57", "{x}", "\n"] * 20
    return (made_record(rng, words, number) for number in range(count))


def photo(width, height, seed=0):
    """Noise with the spectrum of photographs, amplitude 1/f, as a JPEG of quality 90."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    spectrum = np.fft.rfft2(rng.standard_normal((3, height, width)))
    image = np.fft.irfft2(spectrum / np.maximum(frequency, 1 / max(width, height)), s=(height, width))
    image = 128 + 48 * image / image.std()
    buffer = io.BytesIO()
    Image.fromarray(image.clip(0, 255).astype(np.uint8).transpose(1, 2, 0)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def write(path, mode, records=RECORDS, seed=0):
    """Write the set, a pool of 8,192 records again and again; returns how many bytes it has."""
    indent = 2 if mode == "indented list" else None
    pool = [json.dumps(record, ensure_ascii=False, indent=indent) for record in made_records(8192, seed)]
    between = {"indented list": ",\n", "list on one line": ", ", "lines": "\n"}[mode]
    first, last = ("", "\n") if mode == "lines" else ("[", "]")
    with open(path, "w", encoding="utf-8") as file:
        file.write(first)
        for start in range(0, records, len(pool)):
            file.write((between if start else "") + between.join(pool[: records - start]))
        file.write(last)
    return path.stat().st_size


def resident(field):
    """VmRSS or VmHWM of this process in MB."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith(field))


def measure(path):
    """Seconds to open, growth of the peak resident memory in MB, microseconds a random access, MB of a pickled copy."""
    from cdistill.data.llava import LlavaJson

    with open("/proc/self/clear_refs", "w") as clear_refs:
        clear_refs.write("5")  # forget the peak so far
    before = resident("VmRSS")
    start = time.perf_counter()
    source = LlavaJson(path)
    seconds = time.perf_counter() - start
    opened = resident("VmHWM") - before
    kept = resident("VmRSS") - before
    places = random.Random(0).choices(range(len(source)), k=20_000)
    start = time.perf_counter()
    for place in places:
        source[place]
    access = (time.perf_counter() - start) / len(places) * 1e6
    return {
        "records": len(source),
        "open_s": seconds,
        "open_peak_mb": opened,
        "kept_mb": kept,
        "access_us": access,
        "peak_after_accesses_mb": resident("VmHWM") - before,
        "pickled_mb": len(pickle.dumps(source)) / 2**20,
        "whole_process_peak_mb": resident("VmHWM"),
    }


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1])))
