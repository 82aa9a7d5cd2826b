package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	commonv1 "mulligan-client/gen/mulligan/common/v1"
	policyv1 "mulligan-client/gen/mulligan/policy/v1"
)

const streamTimeout = 5 * time.Minute

// stream prints a completion, token by token.
func stream(ctx context.Context, policy policyv1.PolicyServiceClient, o options) error {
	ctx, cancel := context.WithTimeout(ctx, streamTimeout)
	defer cancel()
	prompt := []*commonv1.Message{{Role: commonv1.Role_ROLE_USER, Content: o.prompt}}
	pieces, err := policy.StreamGenerate(ctx, &policyv1.StreamGenerateRequest{Request: &policyv1.GenerateRequest{
		Prompt:   &policyv1.GenerateRequest_Messages{Messages: &policyv1.Messages{Messages: prompt}},
		Sampling: sampling(o),
	}})
	if err != nil {
		return err
	}
	for count := 0; ; {
		piece, err := pieces.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		count += len(piece.TokenIds)
		fmt.Print(piece.Text)
		if piece.StopReason != policyv1.StopReason_STOP_REASON_UNSPECIFIED {
			fmt.Printf("\n%d tokens, %s\n", count, piece.StopReason)
		}
	}
}
