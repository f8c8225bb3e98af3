"""Objectives side by side in small worlds whose truth is known."""
