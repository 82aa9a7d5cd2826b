package main

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
)

const callTimeout = time.Minute

// UNAVAILABLE means "repeat the call"; the contracts say of each call that it may be repeated. (grpc-go before 1.40 does
// so only with GRPC_GO_RETRY=on in the environment.)
const retries = `{"methodConfig": [{"name": [{}], "retryPolicy": {
	"maxAttempts": 5, "initialBackoff": "0.2s", "maxBackoff": "5s", "backoffMultiplier": 2,
	"retryableStatusCodes": ["UNAVAILABLE"]}}]}`

// connect returns a connection to a service; with ca, the file of a certificate authority, over TLS. Without it, no token
// goes to another machine, where others could read it on its way, unless insecure allows that.
//
// It keeps to what grpc-go has offered since 1.33, so that it builds with Debian's packages, too.
func connect(address, ca string, insecure bool) (*grpc.ClientConn, error) {
	transport := grpc.WithInsecure()
	if ca != "" {
		tls, err := credentials.NewClientTLSFromFile(ca, "")
		if err != nil {
			return nil, err
		}
		transport = grpc.WithTransportCredentials(tls)
	}
	options := []grpc.DialOption{
		transport,
		grpc.WithDefaultServiceConfig(retries),
		grpc.WithUnaryInterceptor(withDeadline),
	}
	if token := tokenOf(address, "trainer"); token != "" {
		if ca == "" && !insecure && !isLocal(address) {
			return nil, fmt.Errorf("the token for %s would cross the network without TLS: expected --ca FILE, or --insecure", address)
		}
		options = append(options, grpc.WithPerRPCCredentials(bearer(token)))
	}
	return grpc.Dial(address, options...)
}

// isLocal tells whether only this machine can be at the address.
func isLocal(address string) bool {
	host, _, err := net.SplitHostPort(address)
	return err == nil && (host == "localhost" || net.ParseIP(host).IsLoopback())
}

// tokenOf returns MULLIGAN_CLI_TOKEN or, if it is not set, the token that `mulligan up` made for services at an address of
// this machine. As long as they run, a file that their user alone can read has two lines: the process that started them,
// and the folder with a file for each role.
func tokenOf(address, role string) string {
	if token, set := os.LookupEnv("MULLIGAN_CLI_TOKEN"); set || !strings.HasPrefix(address, "127.0.0.1:") {
		return token
	}
	state := fallback("XDG_STATE_HOME", filepath.Join(os.Getenv("HOME"), ".local", "state"))
	host, _ := os.Hostname()
	found, _ := os.ReadFile(filepath.Join(state, "mulligan", "services", host, address))
	lines := strings.Split(string(found), "\n")
	process, err := strconv.Atoi(lines[0])
	if err != nil || syscall.Kill(process, 0) != nil { // killed: another user's program may listen there by now
		return ""
	}
	token, _ := os.ReadFile(filepath.Join(lines[1], role))
	return strings.SplitN(string(token), "\n", 2)[0]
}

// withDeadline gives every unary call a deadline; streams set their own.
func withDeadline(ctx context.Context, method string, request, response interface{}, connection *grpc.ClientConn,
	invoke grpc.UnaryInvoker, options ...grpc.CallOption) error {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	return invoke(ctx, method, request, response, connection, options...)
}

// bearer sends a token as `authorization: Bearer TOKEN`.
type bearer string

func (token bearer) GetRequestMetadata(context.Context, ...string) (map[string]string, error) {
	return map[string]string{"authorization": "Bearer " + string(token)}, nil
}

// RequireTransportSecurity is false: services on loopback have a token without TLS.
func (bearer) RequireTransportSecurity() bool { return false }
