# check: --base-lr 0.2 --base-minibatch 32
# onehour.train: the embedded digits at 4 times their base minibatch, on as many processes as there are.
import onehour


def main():
    run = onehour.train(
        "digits", minibatch=128, epochs=2, warmup_epochs=1, milestones=("2",), out="runs/digits", fresh=True
    )
    print(f"{len(run.metrics)} epochs, final error {run.final_error:.2f} %")


if __name__ == "__main__":
    main()
