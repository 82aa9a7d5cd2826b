package main

import (
	"fmt"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/status"
)

// explain makes one line for a person: the contract's reason (google.rpc.ErrorInfo) and the message, such as
// `UNKNOWN_TASK: no task "x" in "frozenlake-3x3"`.
func explain(err error) string {
	state, ok := status.FromError(err)
	if !ok {
		return err.Error()
	}
	for _, detail := range state.Details() {
		if info, ok := detail.(*errdetails.ErrorInfo); ok {
			return fmt.Sprintf("%s: %s", info.Reason, state.Message())
		}
	}
	return fmt.Sprintf("%s: %s", state.Code(), state.Message())
}
