"""Pages as a reader gets them."""

from html.parser import HTMLParser


class Page(HTMLParser):
    """Checks that tags nest, and collects text and what the page refers to."""

    VOID = ("meta", "br", "img")

    def __init__(self, html):
        super().__init__()
        self.open, self.text, self.references, self.tags = [], [], [], []
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.references += [value for name, value in attributes if name in ("href", "src", "xlink:href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.open.pop()

    def handle_data(self, data):
        self.text.append(data)
