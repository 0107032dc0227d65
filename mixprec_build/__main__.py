"""The console script ``mixprec``; Ctrl-C ends it quietly during imports too."""

__all__ = ["main"]


def main() -> None:
    try:
        from .cli.app import main as run

        run()
    except KeyboardInterrupt:
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
