package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	trainerv1 "mulligan-client/gen/mulligan/trainer/v1"
)

const (
	watchTimeout = 24 * time.Hour
	watchAgain   = time.Second
)

// smallRun is small enough for the embedded model on a CPU; what is left out has the default that the contract names.
func smallRun(environment string, steps int32) *trainerv1.RunConfig {
	return &trainerv1.RunConfig{
		Environment: environment,
		Steps:       &steps,
		Model:       &trainerv1.ModelConfig{Source: "embedded"},
		Rollout: &trainerv1.RolloutConfig{
			TasksPerStep: proto.Int32(4), RolloutsPerTask: proto.Int32(2), Temperature: proto.Float64(1),
			MaxTokens: proto.Int32(4), ReflectionMaxTokens: proto.Int32(32),
		},
		Loss:       &trainerv1.LossConfig{KlCoefficient: proto.Float64(0)},
		Optimizer:  &trainerv1.OptimizerConfig{LearningRate: proto.Float64(5e-4)},
		Evaluation: &trainerv1.EvaluationConfig{Every: proto.Int32(0), Tasks: proto.Int32(20), Samples: proto.Int32(1)},
	}
}

// train starts a run and watches it to its end. One that exists with the same settings is not started again.
func train(ctx context.Context, trainer trainerv1.RunServiceClient, runID string, config *trainerv1.RunConfig) error {
	if _, err := trainer.StartRun(ctx, &trainerv1.StartRunRequest{RunId: runID, Config: config}); err != nil {
		return err
	}
	fmt.Println("run", runID)
	last := int64(0)
	for {
		err := watch(ctx, trainer, runID, &last)
		if err == nil {
			break
		}
		if status.Code(err) != codes.Unavailable {
			return err
		}
		time.Sleep(watchAgain) // the stream broke: it is taken up after the last event that came
	}
	response, err := trainer.GetRun(ctx, &trainerv1.GetRunRequest{RunId: runID})
	if err != nil {
		return err
	}
	if response.Run.State != trainerv1.RunState_RUN_STATE_COMPLETED {
		return fmt.Errorf("run %s ended as %s", runID, response.Run.State)
	}
	return nil
}

// watch prints events after *last until the run ends, and keeps *last at the latest.
func watch(ctx context.Context, trainer trainerv1.RunServiceClient, runID string, last *int64) error {
	ctx, cancel := context.WithTimeout(ctx, watchTimeout)
	defer cancel()
	events, err := trainer.WatchRun(ctx, &trainerv1.WatchRunRequest{RunId: runID, AfterEvent: *last})
	if err != nil {
		return err
	}
	for {
		response, err := events.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		*last = response.Event.Number
		fmt.Println(describe(response.Event))
	}
}

func describe(event *trainerv1.RunEvent) string {
	switch event := event.Event.(type) {
	case *trainerv1.RunEvent_StepCompleted:
		metrics := event.StepCompleted.Metrics
		return fmt.Sprintf("step %d: first attempts %s, second %s",
			event.StepCompleted.Step, share(metrics, "success_first"), share(metrics, "success_second"))
	case *trainerv1.RunEvent_EvaluationCompleted:
		return fmt.Sprintf("evaluation after %d steps: %.2f", event.EvaluationCompleted.Step, event.EvaluationCompleted.Success)
	case *trainerv1.RunEvent_StateChanged:
		if event.StateChanged.Error == "" {
			return event.StateChanged.State.String()
		}
		return fmt.Sprintf("%s %s", event.StateChanged.State, event.StateChanged.Error)
	case *trainerv1.RunEvent_Notice:
		return event.Notice.Text
	default:
		return "an event that this client does not know" // from a newer server
	}
}

func share(metrics map[string]float64, name string) string {
	if value, ok := metrics[name]; ok {
		return fmt.Sprintf("%.2f", value)
	}
	return "–"
}
