"""The demo: three students of one base, trained on the same samples, beside their teacher."""
