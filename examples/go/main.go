// Command client plays episodes, streams completions, and starts and watches training runs: see README.md.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"

	envv1 "mulligan-client/gen/mulligan/env/v1"
	policyv1 "mulligan-client/gen/mulligan/policy/v1"
	trainerv1 "mulligan-client/gen/mulligan/trainer/v1"
)

const usage = `usage: client play|stream|train [FLAGS]

  play    play one episode
  stream  stream a completion
  train   start a run and watch it

The token of the services, if any, is in MULLIGAN_CLI_TOKEN: a flag would show in the process list. That of your own
mulligan up is found.

flags:
`

type options struct {
	env, policy, trainer, ca string
	insecure                 bool

	environment, task, prompt, runID string
	temperature                      float64
	maxTokens, steps                 int
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	o := options{}
	flags := flag.NewFlagSet("client", flag.ExitOnError)
	flags.Usage = func() {
		fmt.Fprint(flags.Output(), usage)
		flags.PrintDefaults()
	}
	flags.StringVar(&o.env, "env", fallback("MULLIGAN_CLI_ENV", "127.0.0.1:50051"), "`HOST:PORT` of the environment service")
	flags.StringVar(&o.policy, "policy", fallback("MULLIGAN_CLI_POLICY", "127.0.0.1:50052"), "`HOST:PORT` of the policy service")
	flags.StringVar(&o.trainer, "trainer", fallback("MULLIGAN_CLI_TRAINER", "127.0.0.1:50054"), "`HOST:PORT` of the trainer service")
	flags.StringVar(&o.ca, "ca", "", "`FILE` with the certificate authority of services with TLS")
	flags.BoolVar(&o.insecure, "insecure", false, "send the token to another machine without TLS")
	flags.StringVar(&o.environment, "environment", "frozenlake-3x3", "play, train: `NAME` of the environment")
	flags.StringVar(&o.task, "task", "", "play: `ID` of the task; the first of the test split by default")
	flags.StringVar(&o.prompt, "prompt", "Hello", "stream: `TEXT` of the user's message")
	flags.Float64Var(&o.temperature, "temperature", 1, "play, stream: sampling temperature")
	flags.IntVar(&o.maxTokens, "max-tokens", 32, "play, stream: sampled tokens of one answer, at most")
	flags.StringVar(&o.runID, "run-id", "from-go", "train: `ID` of the run")
	flags.IntVar(&o.steps, "steps", 2, "train: training steps")
	if len(os.Args) < 2 {
		flags.Usage()
		os.Exit(2)
	}
	_ = flags.Parse(os.Args[2:])
	if err := run(ctx, os.Args[1], o); err != nil {
		fmt.Fprintln(os.Stderr, "error:", explain(err))
		os.Exit(1)
	}
}

// fallback is the value of an environment variable, or another one where it is not set.
func fallback(variable, value string) string {
	if set := os.Getenv(variable); set != "" {
		return set
	}
	return value
}

func run(ctx context.Context, command string, o options) error {
	addresses := map[string]string{"play": o.policy, "stream": o.policy, "train": o.trainer}
	address, known := addresses[command]
	if !known {
		return fmt.Errorf("no command %q; there are: play, stream, train", command)
	}
	service, err := connect(address, o.ca, o.insecure)
	if err != nil {
		return err
	}
	defer service.Close()
	switch command {
	case "stream":
		return stream(ctx, policyv1.NewPolicyServiceClient(service), o)
	case "train":
		return train(ctx, trainerv1.NewRunServiceClient(service), o.runID, smallRun(o.environment, int32(o.steps)))
	}
	environments, err := connect(o.env, o.ca, o.insecure)
	if err != nil {
		return err
	}
	defer environments.Close()
	return play(ctx, envv1.NewEnvServiceClient(environments), policyv1.NewPolicyServiceClient(service), o)
}
