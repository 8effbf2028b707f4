"""Run directories → one HTML page, and Markdown and CSV beside it; never JAX.

runs → compare, rationales, browser → tables, figures → page
"""
