"""The console script ``mixprec``. Ctrl-C may come while what it needs is still being imported."""

__all__ = ["main"]


def main() -> None:
    try:
        from .cli.app import main as run

        run()
    except KeyboardInterrupt:
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
