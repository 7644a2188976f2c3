"""``cdistill eval``: what it does with a model, and the words that may stand in place of one."""

from cdistill.eval import compare, presets, run, score

add_arguments, main = run.add_arguments, run.main

# word -> help line and module, which has `add_arguments` and `main`
WORDS = {
    "compare": ("compare models that answered the same questions", compare),
    "score": ("score recorded replies or scores of any model", score),
    "presets": ("tell what to download for each benchmark", presets),
}
