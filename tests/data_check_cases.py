"""Made-up sets with faults that are known, and sources of samples given in Python, for tests of `cdistill data check`."""

import json
import os
import random
import signal

from PIL import Image

from cdistill.data.samples import BadSampleError, Mark, Message, Sample, Unread


class Maker:
    """Makes records, each with an image of its own, and puts faults into them."""

    def __init__(self, folder, seed=0):
        self.folder, self.rng, self.count = folder, random.Random(seed), 0

    def image(self, suffix=".jpg", kind="JPEG"):
        self.count += 1
        name = f"pictures/{self.rng.randrange(10)}/{self.count}{suffix}"
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        size = self.rng.randint(20, 60), self.rng.randint(20, 60)
        noise = Image.frombytes("RGB", size, self.rng.randbytes(3 * size[0] * size[1]))
        noise.save(path, kind)
        return name

    def words(self):
        return " ".join(self.rng.choice(("ein", "zwei", "ünf", "naïve", "„x“", "\\", "\n")) for _ in range(5)) + str(
            self.count
        )

    def record(self, image="", turns=None):
        """A good record; ``image`` None makes it text."""
        self.count += 1
        image = self.image() if image == "" else image
        turns = self.rng.randint(1, 3) if turns is None else turns
        said = [{"from": ("human", "gpt")[i % 2], "value": self.words()} for i in range(2 * turns)]
        record = {"id": f"r{self.count}", "conversations": said}
        if image is not None:
            said[0]["value"] = "<image>\n" + said[0]["value"]
            record["image"] = image
        return record

    def broken_file(self, content):
        name = self.image()
        path = self.folder / name
        path.write_bytes(content(path.read_bytes()))
        return self.record(name)

    def faulty(self, kind):
        """A record with the fault of that name."""
        if kind == "missing image":
            return self.record(f"pictures/none{self.count}.jpg")
        if kind == "truncated image":
            return self.broken_file(lambda data: data[: self.rng.randint(len(data) // 4, len(data) // 2)])
        if kind == "unreadable image":
            return self.broken_file(lambda data: self.rng.choice((b"", b"<html>not here</html>", bytes(500))))
        if kind == "image outside its root":
            return self.record(self.rng.choice(("../secret.jpg", "/etc/passwd", "pictures/../../x.png", "out/x.jpg")))
        record = self.record()
        turns = record["conversations"]
        if kind == "unknown role":
            turns[-1]["from"] = self.rng.choice(("GPT", "bot", ""))
        elif kind == "image count":
            turns[0]["value"] += self.rng.choice(("<image>", "<image><image>"))
        elif kind == "empty answer":
            turns[-1]["value"] = self.rng.choice(("", " ", "\n"))
        elif kind == "wrong order of turns":
            turns.insert(1, {"from": "human", "value": "and?"})
        else:
            assert kind == "not a record"
            record = self.rng.choice(({"id": record["id"]}, {"id": record["id"], "conversations": "x"}))
        return record


KINDS = (
    "missing image",
    "truncated image",
    "unreadable image",
    "image outside its root",
    "unknown role",
    "image count",
    "empty answer",
    "wrong order of turns",
    "not a record",
)


def made_up_set(folder, faults, *, seed, good=12, text=3, duplicates=2, misnamed=2, same_ids=2):
    """Records in random order, and by id the reason why they are bad; ids of what is good but odd are among them, too."""
    outside = folder.parent / "outside"
    outside.mkdir(exist_ok=True)
    folder.mkdir()
    (folder / "out").symlink_to(outside)
    maker = Maker(folder, seed)
    records = [maker.record() for _ in range(good)] + [maker.record(None) for _ in range(text)]
    bad = {}
    for kind, count in faults.items():
        for _ in range(count):
            records.append(maker.faulty(kind))
            bad[records[-1]["id"]] = kind
    for _ in range(misnamed):
        records.append(maker.record(maker.image(".jpg", maker.rng.choice(("GIF", "PNG")))))
    maker.rng.shuffle(records)
    clean = [record for record in records if record["id"] not in bad]
    for original in maker.rng.sample(clean, duplicates):
        copy = original | {"id": f"copy{original['id']}"}
        records.insert(maker.rng.randint(records.index(original) + 1, len(records)), copy)
        bad[copy["id"]] = "duplicate record"
    for original in maker.rng.sample(clean, same_ids):
        records.append(maker.record() | {"id": original["id"]})
    return records, bad


def write(path, records, *, lines):
    texts = [json.dumps(record, ensure_ascii=i % 2 == 0) for i, record in enumerate(records)]
    body = "\n".join(texts) + "\n" if lines else "[\n  " + ",\n  ".join(texts) + "\n]"
    path.write_text(body, encoding="utf-8")
    return texts


def listed(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


class Given:
    """A source of given samples; what is no sample is raised, or kills the process."""

    name = "given"
    in_order = False

    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        item = self.items[index]
        if isinstance(item, Exception):
            raise item
        if item is None:
            os.kill(os.getpid(), signal.SIGKILL)
        return item

    def record(self, index):
        raise BadSampleError("unreadable", "it was made up")

    def place(self, index):
        return f"given[{index}]"

    def unread(self, most=None):
        return Unread({}, len(self))

    def sizes(self):
        return None


def said(question, answer, *images, id="x"):
    parts = (*[Mark.IMAGE] * len(images), question)
    return Sample(id, (Message("user", parts), Message("assistant", (answer,))), images, f"place of {id}")
