package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"

	commonv1 "mulligan-client/gen/mulligan/common/v1"
	envv1 "mulligan-client/gen/mulligan/env/v1"
	policyv1 "mulligan-client/gen/mulligan/policy/v1"
)

// play plays one episode: observations from the environment service, actions from the policy service.
func play(ctx context.Context, env envv1.EnvServiceClient, policy policyv1.PolicyServiceClient, o options) error {
	info, err := environment(ctx, env, o.environment)
	if err != nil {
		return err
	}
	task := o.task
	if task == "" {
		if task, err = firstTestTask(ctx, env, o.environment); err != nil {
			return err
		}
	}
	byTokens, err := takesTokens(ctx, policy)
	if err != nil {
		return err
	}
	episode := newID()
	start, err := env.StartEpisode(ctx, &envv1.StartEpisodeRequest{
		EpisodeId: episode, Environment: o.environment, TaskId: task,
	})
	if err != nil {
		return err
	}
	defer func() { // frees the episode's place whatever happened, Ctrl-C included
		_, _ = env.EndEpisode(context.Background(), &envv1.EndEpisodeRequest{EpisodeId: episode})
	}()
	fmt.Printf("episode %s of %s\n%s\n", episode, task, start.Observation)

	conversation := conversation{
		policy: policy, session: episode, byTokens: byTokens, sampling: sampling(o), tools: info.Tools,
	}
	conversation.say(commonv1.Role_ROLE_SYSTEM, "", info.Prompts.GetSolver())
	conversation.say(commonv1.Role_ROLE_USER, "", start.Observation)
	rewards := 0.0
	for index := int32(0); index < info.MaxSteps; index++ {
		action, err := conversation.answer(ctx)
		if err != nil {
			return err
		}
		step, err := env.StepEpisode(ctx, &envv1.StepEpisodeRequest{
			EpisodeId: episode, StepIndex: index, Action: action,
		})
		if err != nil {
			return err
		}
		rewards += step.GetReward()
		fmt.Printf("> %s\n%s\n", step.Action, step.Observation)
		if step.Done {
			fmt.Printf("%s: %s%s\nreward %g\n", step.Outcome, step.Feedback, step.Error, rewards)
			break
		}
		role := commonv1.Role_ROLE_USER
		if step.Tool != "" {
			role = commonv1.Role_ROLE_TOOL
		}
		conversation.say(role, step.Tool, step.Observation)
	}
	return nil
}

func environment(ctx context.Context, env envv1.EnvServiceClient, name string) (*envv1.EnvironmentInfo, error) {
	response, err := env.ListEnvironments(ctx, &envv1.ListEnvironmentsRequest{})
	if err != nil {
		return nil, err
	}
	var names []string
	for _, info := range response.Environments {
		if info.Name == name {
			return info, nil
		}
		names = append(names, info.Name)
	}
	return nil, fmt.Errorf("no environment %q; there are: %q", name, names)
}

func firstTestTask(ctx context.Context, env envv1.EnvServiceClient, environment string) (string, error) {
	request := &envv1.ListTasksRequest{Environment: environment, Split: envv1.Split_SPLIT_TEST, PageSize: 1}
	response, err := env.ListTasks(ctx, request)
	if err != nil {
		return "", err
	}
	if len(response.Tasks) == 0 {
		return "", errors.New(environment + " has no test tasks")
	}
	return response.Tasks[0].TaskId, nil
}

// takesTokens tells whether a conversation can go on from its tokens; otherwise each turn is prompted with all messages.
func takesTokens(ctx context.Context, policy policyv1.PolicyServiceClient) (bool, error) {
	response, err := policy.GetPolicy(ctx, &policyv1.GetPolicyRequest{})
	if err != nil {
		return false, err
	}
	for _, feature := range response.Policy.GetFeatures() {
		if feature == policyv1.Feature_FEATURE_TOKEN_IDS {
			return !response.Policy.RewritesHistory, nil
		}
	}
	return false, nil
}

func sampling(o options) *policyv1.SamplingParams {
	maxTokens := int32(o.maxTokens)
	return &policyv1.SamplingParams{Temperature: &o.temperature, MaxTokens: &maxTokens}
}

// conversation is one with the policy. What was sampled stays as it was: tokens are appended, never encoded again.
type conversation struct {
	policy   policyv1.PolicyServiceClient
	session  string // the same engine, and the same model, for all of it
	byTokens bool
	sampling *policyv1.SamplingParams
	tools    []*commonv1.Tool

	messages   []*commonv1.Message
	tokens     []int32
	turnClosed bool
}

func (c *conversation) say(role commonv1.Role, tool, content string) {
	c.messages = append(c.messages, &commonv1.Message{Role: role, Name: tool, Content: content})
}

func (c *conversation) answer(ctx context.Context) (string, error) {
	request := &policyv1.GenerateRequest{
		RequestId: fmt.Sprintf("%s-%d", c.session, len(c.messages)),
		SessionId: c.session,
		Sampling:  c.sampling,
	}
	if len(c.tokens) > 0 {
		request.Prompt = &policyv1.GenerateRequest_Continuation{Continuation: &policyv1.Continuation{
			TokenIds: c.tokens, TurnClosed: c.turnClosed, Messages: c.messages[len(c.messages)-1:],
		}}
	} else {
		request.Prompt = &policyv1.GenerateRequest_Messages{Messages: &policyv1.Messages{Messages: c.messages}}
		request.Tools = c.tools // the chat template shows them; later turns go on from its tokens
	}
	response, err := c.policy.Generate(ctx, request)
	if err != nil {
		return "", err
	}
	completion := response.Completions[0]
	if c.byTokens {
		c.tokens = append(append(c.tokens, response.PromptTokenIds...), completion.TokenIds...)
	}
	c.turnClosed = completion.StopReason == policyv1.StopReason_STOP_REASON_END_OF_TURN
	c.say(commonv1.Role_ROLE_ASSISTANT, "", completion.Text)
	return completion.Text, nil
}

// newID returns a random id, unique enough for an episode.
func newID() string {
	id := make([]byte, 16)
	if _, err := rand.Read(id); err != nil {
		panic(err) // the operating system has no random numbers
	}
	return fmt.Sprintf("%x", id)
}
