"""One self-contained page about an evaluation: CSS, curves as SVG and videos in one HTML file, for any browser.

It knows nothing of training or sampling: it takes plain numbers, texts and bytes.
"""
